// SPDX-License-Identifier: Apache-2.0
// Declares the few entry points of the OpenMP runtime that Swift calls, so that our own parallel
// loops share oneDNN's threads instead of competing with them.
#pragma once

// Runs `body(argument)` once on each of `threads` threads (0: the default number) and waits.
void GOMP_parallel(void (*body)(void *), void *argument, unsigned threads, unsigned flags);
int omp_get_thread_num(void);
int omp_get_num_threads(void);
int omp_get_max_threads(void);
int omp_in_parallel(void);
void omp_set_num_threads(int threads);
// Ends the calling thread's pool (2: and frees all that belongs to it); not 0 in a parallel region.
int omp_pause_resource_all(unsigned kind);
