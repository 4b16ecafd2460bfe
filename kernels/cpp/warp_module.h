#pragma once

#include <nanobind/nanobind.h>

void define_warp(nanobind::module_& module);
