#pragma once

#include <nanobind/nanobind.h>

void define_cross_entropy(nanobind::module_& module);
