#pragma once

#include <nanobind/nanobind.h>

void define_planes(nanobind::module_& module);
