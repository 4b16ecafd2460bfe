#pragma once

#include <nanobind/nanobind.h>

void define_classifier(nanobind::module_& module);
