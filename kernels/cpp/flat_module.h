#pragma once

#include <nanobind/nanobind.h>

void define_flat(nanobind::module_& module);
