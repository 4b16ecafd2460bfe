#pragma once

#include <nanobind/nanobind.h>

void define_bias(nanobind::module_& module);
