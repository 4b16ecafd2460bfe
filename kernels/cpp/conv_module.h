#pragma once

#include <nanobind/nanobind.h>

void define_conv(nanobind::module_& module);
