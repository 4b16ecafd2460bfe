#pragma once

#include <nanobind/nanobind.h>

void define_steps(nanobind::module_& module);
