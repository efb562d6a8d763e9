# SPDX-License-Identifier: Apache-2.0
# find_package(halfstep) gives the target halfstep::halfstep.

get_filename_component(_halfstep_prefix "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
if(NOT TARGET halfstep::halfstep)
  add_library(halfstep::halfstep SHARED IMPORTED)
  set_target_properties(
    halfstep::halfstep
    PROPERTIES IMPORTED_LOCATION "${_halfstep_prefix}/lib/libhalfstep.so"
               IMPORTED_SONAME "libhalfstep.so.0"
               INTERFACE_INCLUDE_DIRECTORIES "${_halfstep_prefix}/include")
endif()
unset(_halfstep_prefix)
