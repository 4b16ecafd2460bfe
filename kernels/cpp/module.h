// The functions that add the operations of a family to the module.
#pragma once

#include <nanobind/nanobind.h>

void define_bias(nanobind::module_& module);
void define_classifier(nanobind::module_& module);
void define_conv(nanobind::module_& module);
void define_flat(nanobind::module_& module);
void define_norm(nanobind::module_& module);
void define_warp(nanobind::module_& module);
