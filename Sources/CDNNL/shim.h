// SPDX-License-Identifier: Apache-2.0
// Makes oneDNN's C API importable from Swift.
#include <oneapi/dnnl/dnnl.h>
