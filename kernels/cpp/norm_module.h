#pragma once

#include <nanobind/nanobind.h>

void define_norm(nanobind::module_& module);
