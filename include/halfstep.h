/* SPDX-License-Identifier: Apache-2.0 */
/* Halfstep's C interface. */
#ifndef HALFSTEP_H
#define HALFSTEP_H
#ifdef __cplusplus
extern "C" {
#endif

/** Version of the library, such as "0.1.0"; static. */
const char *hs_version(void);

#ifdef __cplusplus
}
#endif
#endif
