// SPDX-License-Identifier: Apache-2.0
// The routines of OpenBLAS that factorizations need; declared here because Fortran has no header.
#ifndef HALFSTEP_CLAPACK_H
#define HALFSTEP_CLAPACK_H

// Fortran's hidden lengths of text arguments come last.
#define HS_TEXT_LENGTH unsigned long

/// Threads that OpenBLAS uses in this process.
int openblas_get_num_threads(void);
/// Sets how many threads OpenBLAS uses in this process.
void openblas_set_num_threads(int count);

/// C := alpha * op(A) * op(B) + beta * C.
void dgemm_(const char *trans_a, const char *trans_b, const int *m, const int *n, const int *k,
            const double *alpha, const double *a, const int *lda, const double *b, const int *ldb,
            const double *beta, double *c, const int *ldc, HS_TEXT_LENGTH, HS_TEXT_LENGTH);

/// C := alpha * A * A' + beta * C, one triangle.
void dsyrk_(const char *uplo, const char *trans, const int *n, const int *k, const double *alpha,
            const double *a, const int *lda, const double *beta, double *c, const int *ldc,
            HS_TEXT_LENGTH, HS_TEXT_LENGTH);

/// The same two in single precision.
void sgemm_(const char *trans_a, const char *trans_b, const int *m, const int *n, const int *k,
            const float *alpha, const float *a, const int *lda, const float *b, const int *ldb,
            const float *beta, float *c, const int *ldc, HS_TEXT_LENGTH, HS_TEXT_LENGTH);
void ssyrk_(const char *uplo, const char *trans, const int *n, const int *k, const float *alpha,
            const float *a, const int *lda, const float *beta, float *c, const int *ldc,
            HS_TEXT_LENGTH, HS_TEXT_LENGTH);

/// Solves op(A) * X = alpha * B or X * op(A) = alpha * B with triangular A.
void dtrsm_(const char *side, const char *uplo, const char *trans, const char *diag, const int *m,
            const int *n, const double *alpha, const double *a, const int *lda, double *b,
            const int *ldb, HS_TEXT_LENGTH, HS_TEXT_LENGTH, HS_TEXT_LENGTH, HS_TEXT_LENGTH);

/// A symmetric matrix as a tridiagonal one between rotations; d: double, s: single precision.
void dsytrd_(const char *uplo, const int *n, double *a, const int *lda, double *d, double *e,
             double *tau, double *work, const int *lwork, int *info, HS_TEXT_LENGTH);
void ssytrd_(const char *uplo, const int *n, float *a, const int *lda, float *d, float *e,
             float *tau, float *work, const int *lwork, int *info, HS_TEXT_LENGTH);
/// All eigenvalues and eigenvectors of a tridiagonal matrix.
void dstedc_(const char *compz, const int *n, double *d, double *e, double *z, const int *ldz,
             double *work, const int *lwork, int *iwork, const int *liwork, int *info,
             HS_TEXT_LENGTH);
void sstedc_(const char *compz, const int *n, float *d, float *e, float *z, const int *ldz,
             float *work, const int *lwork, int *iwork, const int *liwork, int *info,
             HS_TEXT_LENGTH);
/// Multiplies by the rotations of xSYTRD.
void dormtr_(const char *side, const char *uplo, const char *trans, const int *m, const int *n,
             const double *a, const int *lda, const double *tau, double *c, const int *ldc,
             double *work, const int *lwork, int *info, HS_TEXT_LENGTH, HS_TEXT_LENGTH,
             HS_TEXT_LENGTH);
void sormtr_(const char *side, const char *uplo, const char *trans, const int *m, const int *n,
             const float *a, const int *lda, const float *tau, float *c, const int *ldc,
             float *work, const int *lwork, int *info, HS_TEXT_LENGTH, HS_TEXT_LENGTH,
             HS_TEXT_LENGTH);

/// Cholesky factor of a symmetric positive definite matrix.
void dpotrf_(const char *uplo, const int *n, double *a, const int *lda, int *info, HS_TEXT_LENGTH);
/// Solves A * X = B with the Cholesky factor of A.
void dpotrs_(const char *uplo, const int *n, const int *nrhs, const double *a, const int *lda,
             double *b, const int *ldb, int *info, HS_TEXT_LENGTH);
/// Inverse of a symmetric positive definite matrix from its Cholesky factor, one triangle.
void dpotri_(const char *uplo, const int *n, double *a, const int *lda, int *info, HS_TEXT_LENGTH);

#undef HS_TEXT_LENGTH
#endif
