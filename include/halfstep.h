/* SPDX-License-Identifier: Apache-2.0 */
/* Halfstep's C interface: what is not declared here is not public. */
#ifndef HALFSTEP_H
#define HALFSTEP_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/// @file halfstep.h
/// Makes trained networks fit for integer hardware.
///
/// Rules that hold for every function:
/// - Handles are opaque. Distinct handles may be used in parallel, one handle by one thread at a
///   time.
/// - `open`, `create`, `clone` and out-parameters documented as owned end with the matching
///   `_free`, for which NULL is a no-op. Everything else that comes out is lent; the comment says
///   until when.
/// - Inputs are copied unless a name ends in `_borrowed`; data that is read during a call only is
///   not copied if it is dense.
/// - A NULL argument is `HS_ERR_INVALID_ARGUMENT`, unless the comment allows NULL; arrays may be
///   NULL if their count is 0, `error` always. On failure every out-parameter is NULL or 0, and
///   handles are as they were.
/// - Text is UTF-8. Nothing is printed, nothing ends the process.
/// - Option structs begin with `struct_size`, are filled by their `_init`, and grow only at the
///   end; NULL in place of one means defaults, and so does 0 in each field.

// ------------------------------------------------------------------------------------------------
/// @defgroup errors Status and errors
/// @{

/// Outcome of a call: 0 or one of the `HS_ERR_` numbers.
/// 1-19 argument, 20-39 file and format, 40-59 graph, 60-79 numeric, 80-99 system.
/// @since 0.1
typedef int32_t hs_status;

enum {
  HS_OK = 0,                          ///< The call did what it says.
  HS_ERR_INVALID_ARGUMENT = 1,        ///< An argument is outside its documented range.
  HS_ERR_SHAPE_MISMATCH = 2,          ///< A tensor's shape is not the expected one.
  HS_ERR_TYPE_MISMATCH = 3,           ///< A tensor's element type is not the expected one.
  HS_ERR_UNKNOWN_NAME = 4,            ///< A tensor, node, scheme or configuration is not known.
  HS_ERR_INVALID_STATE = 5,           ///< A call came too early: exporting before calibrating.
  HS_ERR_FILE_ACCESS = 20,            ///< A file could not be opened, read or written.
  HS_ERR_MALFORMED_FILE = 21,         ///< A file's bytes do not follow its format.
  HS_ERR_UNSUPPORTED_VERSION = 22,    ///< A version of a format that is not supported.
  HS_ERR_UNSAFE_PATH = 23,            ///< An external-data path leaves the model's folder.
  HS_ERR_INVALID_CONFIGURATION = 24,  ///< A runtime configuration is wrong; see the message.
  HS_ERR_ENCODING_MISMATCH = 25,      ///< Encodings do not fit the model they are loaded into.
  HS_ERR_INVALID_GRAPH = 40,          ///< A cycle, a duplicate name, a missing tensor.
  HS_ERR_UNSUPPORTED_OPERATOR = 41,   ///< Operators that cannot run; the message names all of them.
  HS_ERR_NON_FINITE_VALUE = 60,       ///< A value is NaN or infinite.
  HS_ERR_EMPTY_STATISTICS = 61,       ///< A range cannot be chosen because no data was seen.
  HS_ERR_NUMERIC_FAILURE = 62,        ///< A numeric routine failed.
  HS_ERR_OUT_OF_MEMORY = 80,          ///< Memory could not be allocated.
  HS_ERR_CANCELLED = 81,              ///< The caller's progress callback asked to stop.
  HS_ERR_INTERNAL = 82                ///< A defect in this library or one below it.
};

/// What went wrong; owned by the caller, 1,024 bytes, frozen. Untouched by a call that succeeds.
/// @since 0.1
typedef struct hs_error {
  hs_status status;    ///< An `HS_ERR_` number.
  char message[1020];  ///< Names the culprit; ends with NUL, cut at a character boundary.
} hs_error;

/// Name of a status, such as "HS_ERR_FILE_ACCESS"; static, never NULL.
/// @param[in] status any number
/// @return the constant's name, or "unknown status"
/// @since 0.1
const char *hs_status_name(hs_status status);

/// Version of the library, such as "0.1.0"; static, never NULL.
/// @since 0.1
const char *hs_version(void);

/// Reports how far a long call has come, on the calling thread; must not unwind.
/// @param[in] completed steps done
/// @param[in] total steps in all
/// @param[in] user_data as given with the callback
/// @return 0 to go on; anything else ends the call with `HS_ERR_CANCELLED`
/// @since 0.1
typedef int32_t (*hs_progress_fn)(size_t completed, size_t total, void *user_data);

/// Ends a loan: called once, when the library no longer reads borrowed memory; from any thread.
/// @since 0.1
typedef void (*hs_release_fn)(void *user_data);

/// @}
// ------------------------------------------------------------------------------------------------
/// @defgroup threads Threads
/// @{

/// Sets how many threads calls of this library use from now on, in every thread of the process.
/// @param[in] count 1 to 1024, or 0 for one a core (or what OMP_NUM_THREADS says)
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_INVALID_ARGUMENT
/// @since 0.1
hs_status hs_set_thread_count(int32_t count, hs_error *error);

/// Threads that a call from this thread would use.
/// @since 0.1
int32_t hs_thread_count(void);

/// @}
// ------------------------------------------------------------------------------------------------
/// @defgroup tensors Tensors
/// @{

/// Element type; the numbers are those of ONNX's TensorProto.DataType.
/// @since 0.1
typedef int32_t hs_data_type;

enum {
  HS_DATA_TYPE_FLOAT32 = 1,
  HS_DATA_TYPE_UINT8 = 2,
  HS_DATA_TYPE_INT8 = 3,
  HS_DATA_TYPE_UINT16 = 4,
  HS_DATA_TYPE_INT16 = 5,
  HS_DATA_TYPE_INT32 = 6,
  HS_DATA_TYPE_INT64 = 7,
  HS_DATA_TYPE_STRING = 8,
  HS_DATA_TYPE_BOOL = 9,
  HS_DATA_TYPE_FLOAT16 = 10,
  HS_DATA_TYPE_FLOAT64 = 11,
  HS_DATA_TYPE_UINT32 = 12,
  HS_DATA_TYPE_UINT64 = 13,
  HS_DATA_TYPE_COMPLEX64 = 14,
  HS_DATA_TYPE_COMPLEX128 = 15,
  HS_DATA_TYPE_BFLOAT16 = 16,
  HS_DATA_TYPE_FLOAT8E4M3FN = 17,
  HS_DATA_TYPE_FLOAT8E4M3FNUZ = 18,
  HS_DATA_TYPE_FLOAT8E5M2 = 19,
  HS_DATA_TYPE_FLOAT8E5M2FNUZ = 20,
  HS_DATA_TYPE_UINT4 = 21,
  HS_DATA_TYPE_INT4 = 22,
  HS_DATA_TYPE_FLOAT4E2M1 = 23,
  HS_DATA_TYPE_FLOAT8E8M0 = 24,
  HS_DATA_TYPE_UINT2 = 25,
  HS_DATA_TYPE_INT2 = 26
};

/// Largest rank of a tensor.
/// @since 0.1
#define HS_RANK_MAX 32

/// A strided array that somebody else owns; 32 bytes, frozen.
/// @since 0.1
typedef struct hs_tensor_view {
  /// First element (the one with all indices 0); NULL is allowed only if there are no elements.
  const void *data;
  /// Extents, outermost first, `[rank]`; each 0 or more. May be NULL if `rank` is 0.
  const int64_t *shape;
  /// **Bytes** between neighbors along each dimension, `[rank]`; may be negative or 0. NULL means
  /// dense and row-major. Elements narrower than a byte must be dense.
  const int64_t *strides;
  hs_data_type dtype;  ///< Element type; strings are refused.
  int32_t rank;        ///< 0 (one number) to 32.
} hs_tensor_view;

/// Named tensors in a fixed order, such as what a run gives back. Owns its tensors.
/// @since 0.1
typedef struct hs_tensors hs_tensors;

/// Reads a NumPy file: the arrays of an `.npz` by name, or the one array of an `.npy`, named "".
/// @param[in] path file to read
/// @param[out] out_tensors owned by the caller, see hs_tensors_free()
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_FILE_ACCESS, HS_ERR_MALFORMED_FILE, HS_ERR_TYPE_MISMATCH
/// @since 0.1
hs_status hs_tensors_open_numpy(const char *path, hs_tensors **out_tensors, hs_error *error);

/// Number of tensors.
/// @since 0.1
hs_status hs_tensors_count(const hs_tensors *tensors, size_t *out_count, hs_error *error);

/// One tensor by position, without copying.
/// @param[in] tensors the collection
/// @param[in] index less than the count
/// @param[out] out_name lent until `tensors` is freed; may be NULL if not wanted
/// @param[out] out_view lent until `tensors` is freed; dense, `strides` is NULL
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_INVALID_ARGUMENT
/// @since 0.1
hs_status hs_tensors_get(const hs_tensors *tensors, size_t index, const char **out_name,
                         hs_tensor_view *out_view, hs_error *error);

/// One tensor by name, without copying.
/// @param[in] tensors the collection
/// @param[in] name as hs_tensors_get() gives it
/// @param[out] out_view lent until `tensors` is freed; dense, `strides` is NULL
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_UNKNOWN_NAME
/// @since 0.1
hs_status hs_tensors_find(const hs_tensors *tensors, const char *name, hs_tensor_view *out_view,
                          hs_error *error);

/// Memory of one tensor for writing. It is copied first if anything else shares it, such as a model
/// whose constant it is; earlier views of this tensor then end.
/// @param[in,out] tensors the collection
/// @param[in] index less than the count
/// @param[out] out_data dense and row-major; lent until `tensors` is freed
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_INVALID_ARGUMENT, HS_ERR_OUT_OF_MEMORY
/// @since 0.1
hs_status hs_tensors_get_mutable(hs_tensors *tensors, size_t index, void **out_data,
                                 hs_error *error);

/// Frees the collection and its tensors; NULL is a no-op.
/// @since 0.1
void hs_tensors_free(hs_tensors *tensors);

/// @}
// ------------------------------------------------------------------------------------------------
/// @defgroup models Models
/// @{

/// A trained network.
/// @since 0.1
typedef struct hs_model hs_model;

/// How to open a model.
/// @since 0.1
typedef struct hs_open_options {
  size_t struct_size;  ///< sizeof(hs_open_options)
  /// Folder in which hs_model_open_memory() may find external data; NULL refuses external data.
  /// hs_model_open() uses the file's own folder and ignores this.
  const char *external_data_folder;
} hs_open_options;

/// Fills in defaults; NULL is a no-op.
/// @since 0.1
void hs_open_options_init(hs_open_options *options);

/// Reads an ONNX model from a file, and its external data from the file's folder.
/// @param[in] path file to read
/// @param[in] options may be NULL
/// @param[out] out_model owned by the caller, see hs_model_free()
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_FILE_ACCESS, HS_ERR_MALFORMED_FILE, HS_ERR_UNSUPPORTED_VERSION,
///   HS_ERR_UNSAFE_PATH, HS_ERR_INVALID_GRAPH, HS_ERR_OUT_OF_MEMORY
/// @since 0.1
hs_status hs_model_open(const char *path, const hs_open_options *options, hs_model **out_model,
                        hs_error *error);

/// Reads an ONNX model from memory, which may be freed when the call returns.
/// @param[in] data bytes of the file, `[size]`
/// @param[in] size number of bytes
/// @param[in] options may be NULL
/// @param[out] out_model owned by the caller, see hs_model_free()
/// @param[out] error may be NULL
/// @return as hs_model_open()
/// @since 0.1
hs_status hs_model_open_memory(const void *data, size_t size, const hs_open_options *options,
                               hs_model **out_model, hs_error *error);

/// Copies a model; weights are shared until one of the copies changes them.
/// @param[in] model the original
/// @param[out] out_model owned by the caller, see hs_model_free()
/// @param[out] error may be NULL
/// @return HS_OK
/// @since 0.1
hs_status hs_model_clone(const hs_model *model, hs_model **out_model, hs_error *error);

/// Frees a model; NULL is a no-op. Tensors and simulations made from it live on.
/// @since 0.1
void hs_model_free(hs_model *model);

/// How to save a model.
/// @since 0.1
typedef struct hs_save_options {
  size_t struct_size;     ///< sizeof(hs_save_options)
  int32_t external_data;  ///< Not 0: weights go to `<path>.data`, as they must above 2 GB.
  int32_t reserved;       ///< 0
} hs_save_options;

/// Fills in defaults; NULL is a no-op.
/// @since 0.1
void hs_save_options_init(hs_save_options *options);

/// Writes a model as ONNX; the file appears whole or not at all.
/// @param[in] model the model
/// @param[in] path file to write or replace
/// @param[in] options may be NULL
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_FILE_ACCESS
/// @since 0.1
hs_status hs_model_save(const hs_model *model, const char *path, const hs_save_options *options,
                        hs_error *error);

/// Number of bytes that hs_model_serialize() will write. The bytes are kept for that call.
/// @param[in] model the model
/// @param[out] out_size number of bytes
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_OUT_OF_MEMORY, HS_ERR_INVALID_ARGUMENT above 2 GB
/// @since 0.1
hs_status hs_model_serialized_size(hs_model *model, size_t *out_size, hs_error *error);

/// Writes a model as ONNX, weights inline, to the caller's buffer.
/// @param[in] model the model
/// @param[out] buffer at least hs_model_serialized_size() bytes, `[capacity]`
/// @param[in] capacity bytes that `buffer` has
/// @param[out] out_size bytes written
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_INVALID_ARGUMENT if the buffer is too small (it is then unchanged)
/// @since 0.1
hs_status hs_model_serialize(hs_model *model, void *buffer, size_t capacity, size_t *out_size,
                             hs_error *error);

/// Declared name, type and shape of a graph input or output; lent until the model changes.
/// @since 0.1
typedef struct hs_value_info {
  const char *name;      ///< Tensor name.
  const int64_t *shape;  ///< Extents, `[rank]`; -1 where not fixed. NULL if `rank` is -1 or 0.
  hs_data_type dtype;    ///< Element type; 0 if not declared.
  int32_t rank;          ///< -1 if not declared.
} hs_value_info;

/// Number of tensors that the caller provides to a run.
/// @since 0.1
hs_status hs_model_input_count(const hs_model *model, size_t *out_count, hs_error *error);

/// One tensor that the caller provides.
/// @param[in] model the model
/// @param[in] index less than the count
/// @param[out] out_info lent until the model is changed or freed
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_INVALID_ARGUMENT
/// @since 0.1
hs_status hs_model_input(hs_model *model, size_t index, hs_value_info *out_info, hs_error *error);

/// Number of tensors that a run gives back.
/// @since 0.1
hs_status hs_model_output_count(const hs_model *model, size_t *out_count, hs_error *error);

/// One tensor that a run gives back.
/// @param[in] model the model
/// @param[in] index less than the count
/// @param[out] out_info lent until the model is changed or freed
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_INVALID_ARGUMENT
/// @since 0.1
hs_status hs_model_output(hs_model *model, size_t index, hs_value_info *out_info, hs_error *error);

/// The constants of a model as they are now, in file order, without copying.
/// @param[in] model the model
/// @param[out] out_tensors owned by the caller, see hs_tensors_free(); stays valid and unchanged
///   when the model changes or is freed
/// @param[out] error may be NULL
/// @return HS_OK
/// @since 0.1
hs_status hs_model_initializers(const hs_model *model, hs_tensors **out_tensors, hs_error *error);

/// Replaces a constant, or turns a graph input into a constant.
/// @param[in] model the model
/// @param[in] name a constant of the same type and shape, or a graph input
/// @param[in] value copied
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_UNKNOWN_NAME, HS_ERR_SHAPE_MISMATCH, HS_ERR_TYPE_MISMATCH
/// @since 0.1
hs_status hs_model_set_initializer(hs_model *model, const char *name, const hs_tensor_view *value,
                                   hs_error *error);

/// As hs_model_set_initializer(), without copying: the memory is read until `release` is called.
///
/// If the call fails, `release` is not called. The library never writes to the memory.
/// @param[in] model the model
/// @param[in] name a constant of the same type and shape, or a graph input
/// @param[in] value dense and row-major; `data` aligned to the element's size
/// @param[in] release called once, when nothing reads the memory any more; may be NULL
/// @param[in] user_data handed to `release`; may be NULL
/// @param[out] error may be NULL
/// @return as hs_model_set_initializer()
/// @since 0.1
hs_status hs_model_set_initializer_borrowed(hs_model *model, const char *name,
                                            const hs_tensor_view *value, hs_release_fn release,
                                            void *user_data, hs_error *error);

/// As hs_model_set_initializer_borrowed(), and the library may change the memory as well.
///
/// What changes constants (folding, equalization) does so there as long as nothing else refers to
/// the memory, so that no copy is needed; after a failure the memory is as it was.
/// hs_model_take_initializer() gives a view of it.
/// @param[in,out] model the model
/// @param[in] name a constant of the same type and shape, or a graph input
/// @param[in] value dense and row-major; `data` aligned to the element's size, writable
/// @param[in] release called once, when nothing uses the memory any more; may be NULL
/// @param[in] user_data handed to `release`; may be NULL
/// @param[out] error may be NULL
/// @return as hs_model_set_initializer()
/// @since 0.1
hs_status hs_model_set_initializer_lent(hs_model *model, const char *name,
                                        const hs_tensor_view *value, hs_release_fn release,
                                        void *user_data, hs_error *error);

/// Takes a constant out of the model, which then asks for it as an input; undoes
/// hs_model_set_initializer().
///
/// Once every weight is out, hs_model_serialize() writes the structure alone.
/// @param[in,out] model the model
/// @param[in] name a constant
/// @param[out] out_tensors the constant alone; owned by the caller, see hs_tensors_free()
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_UNKNOWN_NAME
/// @since 0.1
hs_status hs_model_take_initializer(hs_model *model, const char *name, hs_tensors **out_tensors,
                                    hs_error *error);

/// What a run gives back.
/// @since 0.1
typedef struct hs_run_options {
  size_t struct_size;                ///< sizeof(hs_run_options)
  const char *const *extra_outputs;  ///< Tensors wanted besides the outputs.
  size_t extra_output_count;         ///< Length of `extra_outputs`.
} hs_run_options;

/// Fills in defaults; NULL is a no-op.
/// @since 0.1
void hs_run_options_init(hs_run_options *options);

/// Runs the network in float arithmetic.
/// @param[in] model the model; it keeps what it compiled for the next run
/// @param[in] names inputs, `[count]`
/// @param[in] values their values, `[count]`; read during the call only
/// @param[in] count number of inputs
/// @param[in] options may be NULL
/// @param[out] out_outputs outputs, then extra outputs; owned by the caller, see hs_tensors_free()
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_UNSUPPORTED_OPERATOR, HS_ERR_UNKNOWN_NAME, HS_ERR_SHAPE_MISMATCH,
///   HS_ERR_TYPE_MISMATCH, HS_ERR_INVALID_ARGUMENT
/// @since 0.1
hs_status hs_model_run(hs_model *model, const char *const *names, const hs_tensor_view *values,
                       size_t count, const hs_run_options *options, hs_tensors **out_outputs,
                       hs_error *error);

/// @}
// ------------------------------------------------------------------------------------------------
/// @defgroup inspection Inspection
/// @{

/// What the layers of a model look like.
/// @since 0.1
typedef struct hs_inspection hs_inspection;

/// A layer that has a weight; lent until the inspection is freed.
/// @since 0.1
typedef struct hs_layer {
  const char *name;              ///< Node name, or operator and first output if it has none.
  const char *op_type;           ///< Operator, such as "Conv".
  const char *weight;            ///< Name of the weight.
  const float *channel_minimum;  ///< Least weight of each output channel, `[channel_count]`.
  const float *channel_maximum;  ///< Largest weight of each output channel, `[channel_count]`.
  size_t channel_count;          ///< Output channels.
  size_t weight_count;           ///< Elements of the weight.
} hs_layer;

/// Measures the weights of every convolution and matrix product.
/// @param[in] model the model
/// @param[out] out_inspection owned by the caller, see hs_inspection_free()
/// @param[out] error may be NULL
/// @return HS_OK
/// @since 0.1
hs_status hs_model_inspect(const hs_model *model, hs_inspection **out_inspection, hs_error *error);

/// Number of layers.
/// @since 0.1
hs_status hs_inspection_layer_count(const hs_inspection *inspection, size_t *out_count,
                                    hs_error *error);

/// One layer, in the order in which they run.
/// @param[in] inspection the inspection
/// @param[in] index less than the count
/// @param[out] out_layer lent until the inspection is freed
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_INVALID_ARGUMENT
/// @since 0.1
hs_status hs_inspection_layer(const hs_inspection *inspection, size_t index, hs_layer *out_layer,
                              hs_error *error);

/// Frees an inspection; NULL is a no-op.
/// @since 0.1
void hs_inspection_free(hs_inspection *inspection);

/// @}
// ------------------------------------------------------------------------------------------------
/// @defgroup folding Batch-norm folding
/// @{

/// The folds that were made.
/// @since 0.1
typedef struct hs_fold_report hs_fold_report;

/// One fold; lent until the report is freed.
/// @since 0.1
typedef struct hs_fold {
  const char *layer;       ///< Layer that took the batch norm in.
  const char *batch_norm;  ///< Batch norm that is gone.
  int32_t is_forward;      ///< Not 0 if the batch norm came before the layer.
  int32_t reserved;        ///< 0
} hs_fold;

/// Folds batch norms into the layers beside them; those left are rewritten as scale and shift.
///
/// The network's function stays the same up to float rounding.
/// @param[in,out] model unchanged if the call fails
/// @param[out] out_report owned by the caller, see hs_fold_report_free(); may be NULL if not wanted
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_NON_FINITE_VALUE, HS_ERR_INVALID_GRAPH
/// @since 0.1
hs_status hs_model_fold_batch_norms(hs_model *model, hs_fold_report **out_report, hs_error *error);

/// Number of folds.
/// @since 0.1
hs_status hs_fold_report_count(const hs_fold_report *report, size_t *out_count, hs_error *error);

/// One fold.
/// @param[in] report the report
/// @param[in] index less than the count
/// @param[out] out_fold lent until the report is freed
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_INVALID_ARGUMENT
/// @since 0.1
hs_status hs_fold_report_get(const hs_fold_report *report, size_t index, hs_fold *out_fold,
                             hs_error *error);

/// Frees a report; NULL is a no-op.
/// @since 0.1
void hs_fold_report_free(hs_fold_report *report);

/// @}
// ------------------------------------------------------------------------------------------------
/// @defgroup equalization Cross-layer equalization
/// @{

/// How to equalize.
/// @since 0.1
typedef struct hs_equalization_options {
  size_t struct_size;  ///< sizeof(hs_equalization_options)
  /// Not 0: the next layer absorbs high biases, which may change the network's function.
  int32_t absorbs_high_biases;
  int32_t maximum_iterations;  ///< Passes over the model at most; 0 means 50.
  hs_progress_fn progress;     ///< Called after each pass; may be NULL.
  void *user_data;             ///< Handed to `progress`.
} hs_equalization_options;

/// Fills in defaults; NULL is a no-op.
/// @since 0.1
void hs_equalization_options_init(hs_equalization_options *options);

/// Which layers were equalized with which.
/// @since 0.1
typedef struct hs_equalization_report hs_equalization_report;

/// Layers that were equalized together; lent until the report is freed.
/// @since 0.1
typedef struct hs_equalized_set {
  const char *const *layers;  ///< Layers in the order in which they run, `[layer_count]`.
  /// What each tensor between two layers was divided by, `[factor_count]` lists.
  const float *const *factors;
  const size_t *channel_counts;  ///< Length of each list of factors, `[factor_count]`.
  size_t layer_count;            ///< Number of layers.
  size_t factor_count;           ///< Number of tensors between them that were scaled.
} hs_equalized_set;

/// Balances the weight ranges of consecutive layers, without changing the network's function
/// (unless high biases are absorbed).
///
/// Fold batch norms first: a batch norm between two layers keeps them apart.
/// @param[in,out] model unchanged if the call fails
/// @param[in] options may be NULL
/// @param[out] out_report owned by the caller, see hs_equalization_report_free(); may be NULL
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_NON_FINITE_VALUE, HS_ERR_INVALID_ARGUMENT, HS_ERR_CANCELLED
/// @since 0.1
hs_status hs_model_equalize(hs_model *model, const hs_equalization_options *options,
                            hs_equalization_report **out_report, hs_error *error);

/// Number of passes that were made over the model.
/// @since 0.1
hs_status hs_equalization_report_iterations(const hs_equalization_report *report,
                                            size_t *out_iterations, hs_error *error);

/// Number of sets of layers.
/// @since 0.1
hs_status hs_equalization_report_count(const hs_equalization_report *report, size_t *out_count,
                                       hs_error *error);

/// One set of layers.
/// @param[in] report the report
/// @param[in] index less than the count
/// @param[out] out_set lent until the report is freed
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_INVALID_ARGUMENT
/// @since 0.1
hs_status hs_equalization_report_get(const hs_equalization_report *report, size_t index,
                                     hs_equalized_set *out_set, hs_error *error);

/// Frees a report; NULL is a no-op.
/// @since 0.1
void hs_equalization_report_free(hs_equalization_report *report);

/// @}
// ------------------------------------------------------------------------------------------------
/// @defgroup compression Compression
/// @{

/// How layers are made smaller.
/// @since 0.1
typedef int32_t hs_compression_scheme;

enum {
  HS_COMPRESSION_WEIGHT_SVD = 0,      ///< A 1x1 layer to fewer channels before each layer.
  HS_COMPRESSION_SPATIAL_SVD = 1,     ///< A vertical and a horizontal kernel for each kernel.
  HS_COMPRESSION_CHANNEL_PRUNING = 2  ///< Fewer channels between layers.
};

/// Which channels go first in channel pruning.
/// @since 0.1
typedef int32_t hs_channel_importance;

enum {
  /// Those that the layers reading them miss least once the others make up for them; needs
  /// hs_compressor_calibrate().
  HS_CHANNELS_BY_RECONSTRUCTION = 0,
  HS_CHANNELS_BY_MAGNITUDE = 1  ///< Those that are read with the smallest squared weights.
};

/// What a ratio (compressed cost over original cost) speaks of.
/// @since 0.1
typedef int32_t hs_compression_metric;

enum {
  HS_METRIC_MACS = 0,   ///< Multiply-accumulates.
  HS_METRIC_MEMORY = 1  ///< Elements of weights.
};

/// How to compress.
/// @since 0.1
typedef struct hs_compression_options {
  size_t struct_size;                  ///< sizeof(hs_compression_options)
  hs_compression_scheme scheme;        ///< How layers are made smaller.
  hs_compression_metric metric;        ///< What ratios speak of.
  int64_t multiplicity;                ///< Sizes are rounded up to multiples; 0 means 1.
  const char *const *ignored_layers;   ///< Nodes or weights that stay, `[ignored_layer_count]`.
  size_t ignored_layer_count;          ///< Number of ignored layers.
  const char *const *input_names;      ///< Inputs whose shapes are given, `[input_count]`.
  const int64_t *const *input_shapes;  ///< Their extents, `[input_count]` lists.
  const int32_t *input_ranks;          ///< Lengths of the lists, `[input_count]`.
  size_t input_count;                  ///< Needed for open extents; an open first one counts as 1.
  hs_channel_importance importance;    ///< Only for channel pruning: which channels go first.
  /// Only for channel pruning. 0: layers are fitted to the channels that are left, which needs
  /// hs_compressor_calibrate(). Not 0: they keep their weights.
  int32_t without_reconstruction;
  /// Only for channel pruning: nodes or weights that keep all channels that they read,
  /// `[input_keeper_count]`. AIMET's modules to ignore are such.
  const char *const *input_keepers;
  size_t input_keeper_count;  ///< Number of layers that keep what they read.
  /// Only for channel pruning. Not 0: channels stay that Split, Slice and Gather pick by position;
  /// for networks that are described in a program of which nothing but weights can be changed.
  int32_t keeps_positions;
} hs_compression_options;

/// Fills in defaults (all zero); NULL is a no-op.
/// @since 0.1
void hs_compression_options_init(hs_compression_options *options);

/// Compresses a model, as often as wanted.
/// @since 0.1
typedef struct hs_compressor hs_compressor;

/// What a layer costs for one sample; lent until the compressor is freed.
/// @since 0.1
typedef struct hs_layer_cost {
  const char *name;     ///< Node name, or operator and first output.
  const char *op_type;  ///< Operator, such as "Conv".
  const char *weight;   ///< Name of the weight.
  int64_t macs;         ///< Multiply-accumulates.
  int64_t parameters;   ///< Elements of the weight.
} hs_layer_cost;

/// A layer that can be split, or whose output channels can be pruned; lent until the compressor is
/// freed.
///
/// Layers whose outputs are added, or that are coupled in another way, lose the same channels: the
/// first of them stands for all.
/// @since 0.1
typedef struct hs_compressible_layer {
  const char *name;       ///< Node name, or operator and first output.
  const char *op_type;    ///< Operator, such as "Conv".
  const char *weight;     ///< Name of the weight.
  int64_t macs;           ///< Multiply-accumulates.
  int64_t parameters;     ///< Elements of the weight.
  int64_t maximum_units;  ///< Largest rank, or number of channels that can be pruned.
} hs_compressible_layer;

/// A layer that cannot be compressed; lent until the compressor is freed.
/// @since 0.1
typedef struct hs_compression_refusal {
  const char *layer;   ///< The layer.
  const char *reason;  ///< Why.
} hs_compression_refusal;

/// Finds out what of a model can be compressed.
/// @param[in] model stays as it is and may be freed before the compressor
/// @param[in] options may be NULL
/// @param[out] out_compressor owned by the caller, see hs_compressor_free()
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_INVALID_ARGUMENT (options, or an input with open extents),
///   HS_ERR_UNKNOWN_NAME (an ignored layer or an input), HS_ERR_UNSUPPORTED_OPERATOR
/// @since 0.1
hs_status hs_compressor_create(const hs_model *model, const hs_compression_options *options,
                               hs_compressor **out_compressor, hs_error *error);

/// Frees a compressor; NULL is a no-op.
/// @since 0.1
void hs_compressor_free(hs_compressor *compressor);

/// Number of convolutions and matrix products of the model.
/// @since 0.1
hs_status hs_compressor_cost_count(const hs_compressor *compressor, size_t *out_count,
                                   hs_error *error);

/// What one of them costs, in the order in which they run.
///
/// A convolution takes one multiply-accumulate for each weight at each output position (a
/// transposed one at each input position), a matrix product one for each weight in each row. The
/// first axis is the batch and does not count.
/// @param[in] compressor the compressor
/// @param[in] index less than the count
/// @param[out] out_cost lent until the compressor is freed
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_INVALID_ARGUMENT
/// @since 0.1
hs_status hs_compressor_cost(const hs_compressor *compressor, size_t index, hs_layer_cost *out_cost,
                             hs_error *error);

/// Number of layers that can be compressed.
/// @since 0.1
hs_status hs_compressor_layer_count(const hs_compressor *compressor, size_t *out_count,
                                    hs_error *error);

/// One of them, in the order in which they run.
/// @param[in] compressor the compressor
/// @param[in] index less than the count
/// @param[out] out_layer lent until the compressor is freed
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_INVALID_ARGUMENT
/// @since 0.1
hs_status hs_compressor_layer(const hs_compressor *compressor, size_t index,
                              hs_compressible_layer *out_layer, hs_error *error);

/// Number of layers that cannot be compressed; ignored layers are not among them.
/// @since 0.1
hs_status hs_compressor_refusal_count(const hs_compressor *compressor, size_t *out_count,
                                      hs_error *error);

/// One of them, and why.
/// @param[in] compressor the compressor
/// @param[in] index less than the count
/// @param[out] out_refusal lent until the compressor is freed
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_INVALID_ARGUMENT
/// @since 0.1
hs_status hs_compressor_refusal(const hs_compressor *compressor, size_t index,
                                hs_compression_refusal *out_refusal, hs_error *error);

/// Index of a compressible layer by node name, weight, or weight without ".weight".
/// @param[in] compressor the compressor
/// @param[in] name the name
/// @param[out] out_index for hs_compressor_layer()
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_UNKNOWN_NAME, HS_ERR_UNSUPPORTED_OPERATOR (it cannot be compressed)
/// @since 0.1
hs_status hs_compressor_find(const hs_compressor *compressor, const char *name, size_t *out_index,
                             hs_error *error);

/// Indices of what a layer reads. AIMET gives ratios of channel pruning to layers that read the
/// channels, this library to layers that write them; where layers are split, the layer itself.
/// @param[in] compressor the compressor
/// @param[in] name node name, weight, or weight without ".weight"
/// @param[out] out_indices for hs_compressor_layer(), ascending, `[capacity]`; may be NULL to count
/// @param[in] capacity room in `out_indices`
/// @param[out] out_count number of indices, 1 or more
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_UNKNOWN_NAME, HS_ERR_UNSUPPORTED_OPERATOR (with the reason: no channel
///   that the layer reads can be pruned), HS_ERR_INVALID_ARGUMENT (too little room)
/// @since 0.1
hs_status hs_compressor_find_read(const hs_compressor *compressor, const char *name,
                                  size_t *out_indices, size_t capacity, size_t *out_count,
                                  hs_error *error);

/// What layers do with channels.
/// @since 0.1
typedef int32_t hs_channel_role;

enum {
  HS_CHANNELS_WRITTEN = 0,  ///< Layers that write the channels.
  HS_CHANNELS_READ = 1      ///< Layers whose weights have inputs for them.
};

/// Layers that write or read the channels of a compressible layer; where layers are split, the
/// layer itself.
/// @param[in] compressor the compressor
/// @param[in] index a compressible layer
/// @param[in] role which layers
/// @param[out] out_costs indices for hs_compressor_cost(), ascending, `[capacity]`; may be NULL to
///   count
/// @param[in] capacity room in `out_costs`
/// @param[out] out_count number of layers
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_INVALID_ARGUMENT
/// @since 0.1
hs_status hs_compressor_members(const hs_compressor *compressor, size_t index, hs_channel_role role,
                                size_t *out_costs, size_t capacity, size_t *out_count,
                                hs_error *error);

/// Takes unlabeled inputs: from now on layers are split for them, and sizes chosen by what they do
/// to the layers' outputs.
///
/// Each layer's factors minimize the error of its output in the second moments of its input, behind
/// the layers that were split before it, and the bias takes the means. Factors that are best for
/// the weight alone stay where they do better on rows that were held out.
/// @param[in,out] compressor keeps a copy of the data; unchanged if the call fails
/// @param[in] names the model's inputs, `[count]`
/// @param[in] values their values, float32 `[N, ...]` each; a few hundred samples are plenty
/// @param[in] count number of inputs
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_UNKNOWN_NAME, HS_ERR_SHAPE_MISMATCH, HS_ERR_TYPE_MISMATCH,
///   HS_ERR_NON_FINITE_VALUE, HS_ERR_EMPTY_STATISTICS
/// @since 0.1
hs_status hs_compressor_calibrate(hs_compressor *compressor, const char *const *names,
                                  const hs_tensor_view *values, size_t count, hs_error *error);

/// The share of a layer that each size loses when nothing else is compressed: of the power of its
/// output around its mean with data, else of its squared weight.
///
/// The first call works for all layers, and hs_compressor_select() counts as one.
/// @param[in] compressor the compressor
/// @param[in] index a compressible layer
/// @param[in] progress called on this thread; may be NULL
/// @param[in] user_data handed to `progress`
/// @param[out] out_errors share of sizes 0, 1, ..., falling from 1 to 0, `[*out_count]`; NULL to
///   learn the count
/// @param[in] capacity room in `out_errors`
/// @param[out] out_count number of sizes: all, or with data up to what costs as much as the layer
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_INVALID_ARGUMENT (also if the room is too small),
///   HS_ERR_NON_FINITE_VALUE, HS_ERR_CANCELLED
/// @since 0.1
hs_status hs_compressor_errors(const hs_compressor *compressor, size_t index,
                               hs_progress_fn progress, void *user_data, double *out_errors,
                               size_t capacity, size_t *out_count, hs_error *error);

/// The rank that a ratio means, or the number of channels (that share of all), rounded up to the
/// multiplicity.
/// @param[in] compressor the compressor
/// @param[in] index a compressible layer
/// @param[in] ratio above 0
/// @param[out] out_units 0 for ratios of 1 and more: the layer stays as it is
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_INVALID_ARGUMENT
/// @since 0.1
hs_status hs_compressor_units(const hs_compressor *compressor, size_t index, double ratio,
                              int64_t *out_units, hs_error *error);

/// The ratio that a size of a layer amounts to: its cost over the layer's.
/// @param[in] compressor the compressor
/// @param[in] index a compressible layer
/// @param[in] units 1 to the layer's maximum
/// @param[out] out_ratio above 0; above 1 for sizes that cost more than the layer
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_INVALID_ARGUMENT
/// @since 0.1
hs_status hs_compressor_ratio(const hs_compressor *compressor, size_t index, int64_t units,
                              double *out_ratio, hs_error *error);

/// Chooses sizes without evaluating the network: the sum of the layers' relative errors is least
/// among all choices within the target.
/// @param[in] compressor the compressor
/// @param[in] target cost wanted over original cost, in (0, 1]
/// @param[in] progress called on this thread; may be NULL
/// @param[in] user_data handed to `progress`
/// @param[out] out_units size of each compressible layer, 0 for those that stay, `[capacity]`
/// @param[in] capacity number of compressible layers, or more
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_INVALID_ARGUMENT (also if the target cannot be reached),
///   HS_ERR_EMPTY_STATISTICS (channels by reconstruction without data), HS_ERR_NON_FINITE_VALUE,
///   HS_ERR_CANCELLED
/// @since 0.1
hs_status hs_compressor_select(const hs_compressor *compressor, double target,
                               hs_progress_fn progress, void *user_data, int64_t *out_units,
                               size_t capacity, hs_error *error);

/// Chooses sizes as AIMET does, from scores of networks in which one layer is compressed.
/// @param[in] compressor the compressor
/// @param[in] target cost wanted over original cost, in (0, 1]; met within 0.001 where scores allow
/// @param[in] ratios ratios that were tried, rising, in (0, 1], `[candidate_count]`
/// @param[in] scores score of each layer at each ratio, higher is better,
///   `[layer count, candidate_count]`
/// @param[in] candidate_count 1 or more
/// @param[in] uses_monotonic_fit not 0: a rising polynomial of degree 7 replaces each layer's
/// scores
/// @param[out] out_units size of each compressible layer, 0 for those that stay, `[capacity]`
/// @param[in] capacity number of compressible layers, or more
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_INVALID_ARGUMENT
/// @since 0.1
hs_status hs_compressor_select_greedy(const hs_compressor *compressor, double target,
                                      const double *ratios, const double *scores,
                                      size_t candidate_count, int32_t uses_monotonic_fit,
                                      int64_t *out_units, size_t capacity, hs_error *error);

/// What compression did.
/// @since 0.1
typedef struct hs_compression_report hs_compression_report;

/// What happened to a layer; lent until the report is freed.
/// @since 0.1
typedef struct hs_compressed_layer {
  const char *name;           ///< Node name before compression; NULL for the network.
  const char *op_type;        ///< Operator, such as "Conv"; NULL for the network.
  int64_t units;              ///< Rank, or channels that stay; 0 if none was chosen.
  int64_t maximum_units;      ///< Largest rank or number; 0 if it cannot be compressed.
  int64_t macs_before;        ///< Multiply-accumulates before.
  int64_t macs_after;         ///< Multiply-accumulates after, of both layers if it was split.
  int64_t parameters_before;  ///< Elements of weights before.
  int64_t parameters_after;   ///< Elements of weights after.
  const char *weight;         ///< Name of the weight before; NULL for the network.
  const char *first_weight;   ///< Weight of the first of two layers; NULL if it stayed as it was.
  const char *second_weight;  ///< Weight of the second; NULL if it stayed as it was.
  const char *bias;           ///< Bias of the second, or one that was fitted; NULL if none is.
  double noise_plain;         ///< Noise over signal on held-out rows of the plain factors; or -1.
  double noise_kept;          ///< The same of what was kept, never larger; -1 without data.
} hs_compressed_layer;

/// Compresses.
/// @param[in] compressor the compressor
/// @param[in] units size of each compressible layer, 0 for those that stay, `[unit_count]`
/// @param[in] unit_count number of compressible layers
/// @param[in] progress called on this thread; may be NULL
/// @param[in] user_data handed to `progress`
/// @param[out] out_model owned by the caller, see hs_model_free()
/// @param[out] out_report owned by the caller, see hs_compression_report_free(); may be NULL
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_INVALID_ARGUMENT, HS_ERR_EMPTY_STATISTICS (channel pruning that needs data
///   and has none), HS_ERR_NON_FINITE_VALUE, HS_ERR_NUMERIC_FAILURE, HS_ERR_CANCELLED
/// @since 0.1
hs_status hs_compressor_compress(const hs_compressor *compressor, const int64_t *units,
                                 size_t unit_count, hs_progress_fn progress, void *user_data,
                                 hs_model **out_model, hs_compression_report **out_report,
                                 hs_error *error);

/// What happened to the network as a whole.
/// @since 0.1
hs_status hs_compression_report_total(const hs_compression_report *report,
                                      hs_compressed_layer *out_total, hs_error *error);

/// Number of layers, compressed or not.
/// @since 0.1
hs_status hs_compression_report_count(const hs_compression_report *report, size_t *out_count,
                                      hs_error *error);

/// One layer, in the order in which they ran before.
/// @param[in] report the report
/// @param[in] index less than the count
/// @param[out] out_layer lent until the report is freed
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_INVALID_ARGUMENT
/// @since 0.1
hs_status hs_compression_report_get(const hs_compression_report *report, size_t index,
                                    hs_compressed_layer *out_layer, hs_error *error);

/// A constant that lost channels along an axis; lent until the report is freed.
/// @since 0.1
typedef struct hs_pruned_constant {
  const char *name;     ///< Name before; a constant of several nodes may occur for each.
  const char *result;   ///< Name in the compressed model.
  int64_t axis;         ///< Axis of the channels.
  const int64_t *kept;  ///< Indices that stay, rising, `[kept_count]`.
  size_t kept_count;    ///< Number of indices that stay.
} hs_pruned_constant;

/// Number of constants that lost channels, each counted for each axis.
/// @since 0.1
hs_status hs_compression_report_constant_count(const hs_compression_report *report,
                                               size_t *out_count, hs_error *error);

/// One constant that lost channels, in the order of the nodes that read them.
/// @param[in] report the report
/// @param[in] index less than the count
/// @param[out] out_constant lent until the report is freed
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_INVALID_ARGUMENT
/// @since 0.1
hs_status hs_compression_report_constant(const hs_compression_report *report, size_t index,
                                         hs_pruned_constant *out_constant, hs_error *error);

/// Frees a report; NULL is a no-op.
/// @since 0.1
void hs_compression_report_free(hs_compression_report *report);

/// @}
// ------------------------------------------------------------------------------------------------
/// @defgroup rounding Rounding
/// @{

/// How weights are rounded.
/// @since 0.1
typedef int32_t hs_rounding_method;

enum {
  HS_ROUNDING_AUTO = 0,      ///< What does best on held-out rows for the effort.
  HS_ROUNDING_GRAM = 1,      ///< Linear algebra on Gram matrices of the layers' inputs.
  HS_ROUNDING_GRADIENT = 2,  ///< AdaRound by gradient descent, with AIMET's defaults.
  /// Rounding to nearest on scales searched for the least error of each layer's output.
  HS_ROUNDING_SEQUENTIAL_MSE = 3
};

/// How far rounding is. 40 bytes, frozen; lent for the time of a callback.
/// @since 0.1
typedef struct hs_rounding_progress {
  const char *layer;    ///< Name of the layer at work; "calibration" before the first.
  size_t completed;     ///< Layers that are done.
  size_t total;         ///< Layers in all.
  double fraction;      ///< Share of the layer at work that is done, 0 to 1.
  double seconds_left;  ///< About how long the rest will take; negative while nothing tells.
} hs_rounding_progress;

/// Reports how far rounding is, on the calling thread; must not unwind.
/// @param[in] progress lent until the callback returns
/// @param[in] user_data as given with the callback
/// @return 0 to go on; anything else ends the call with `HS_ERR_CANCELLED`
/// @since 0.1
typedef int32_t (*hs_rounding_progress_fn)(const hs_rounding_progress *progress, void *user_data);

/// What rounding aims at and may use.
/// @since 0.1
typedef struct hs_rounding_options {
  size_t struct_size;         ///< sizeof(hs_rounding_options)
  hs_rounding_method method;  ///< How weights are rounded.
  int32_t parameter_bits;     ///< 2 to 16; 0 means 4, or 8 for bias correction.
  int32_t activation_bits;    ///< 2 to 16 while rounding; 0 means 8, 32 keeps them in float.
  int32_t scheme;     ///< hs_range_scheme of activations, and of weights rounded to nearest.
  double percentile;  ///< Only for HS_RANGE_SCHEME_PERCENTILE: 50 to 100; 0 means 100.
  const char *configuration;  ///< Built-in name or path of a JSON file; NULL for the default.
  const char *const *excluded_layers;  ///< Names of nodes that stay in float; may be NULL.
  size_t excluded_layer_count;         ///< Length of `excluded_layers`.
  size_t maximum_rows;                 ///< Rows that a layer learns from at most; 0 means 32,768.
  size_t maximum_bytes;                ///< Bytes of activations in memory; 0 means 64 MiB.
  uint64_t seed;                       ///< Decides which rows are drawn.
  int32_t floor_or_ceil;    ///< Not 0: a weight only goes to one of its two neighbors on the grid.
  int32_t iterations;       ///< Of gradient methods; 0 means their default.
  hs_progress_fn progress;  ///< Told how many layers are done; may be NULL.
  void *user_data;          ///< Handed to `progress` and `details`.
  /// Folder, made if it is not there, in which the result of each layer is kept under a hash of all
  /// that it depends on: a cancelled run goes on where it ended, and one with another option redoes
  /// only the layers that it changes. Nothing is ever removed. NULL keeps nothing.
  const char *cache;
  /// Input channels that share a scale, as in hs_simulation_options; 0: all of a channel.
  int32_t block_size;
  int32_t candidates;  ///< Scales that HS_ROUNDING_SEQUENTIAL_MSE tries, to 1,000; 0 means 20.
  /// Weight of HS_ROUNDING_GRADIENT's regularizer; 0 means 0.01, a negative number none.
  double regularization;
  double beta_start;  ///< Its exponent when it sets in, 1 to 1,000; 0 means 20.
  double beta_end;    ///< Its exponent at the end, 1 to 1,000; 0 means 2.
  /// Share of the iterations without it, less than 1; 0 means 0.2, a negative number none.
  double warm_start;
  const char *const
      *width_layers;      ///< Nodes whose weights have other widths, none excluded; may be NULL.
  const int32_t *widths;  ///< Their widths, 2 to 16, `[width_count]`.
  size_t width_count;     ///< Length of `width_layers` and of `widths`.
  hs_rounding_progress_fn details;  ///< Told also within layers how far it is; may be NULL.
} hs_rounding_options;

/// Fills in defaults; NULL is a no-op.
/// @since 0.1
void hs_rounding_options_init(hs_rounding_options *options);

/// What rounding did, layer by layer.
/// @since 0.1
typedef struct hs_rounding_report hs_rounding_report;

/// What became of a layer; lent until the report is freed.
/// @since 0.1
typedef struct hs_rounded_layer {
  const char *layer;   ///< Node name, or operator and first output.
  const char *weight;  ///< Name of the weight.
  const char *kept;    ///< How the kept weights were found; "nearest" if nothing did better.
  /// Noise over signal on held-out data, rounded to nearest: of the layer's output, or, for bias
  /// correction, of the outputs of the quantized network.
  double noise_before;
  double noise_after;  ///< Noise over signal with what was kept; never larger.
  int32_t bits;        ///< Width of the weight's codes.
  int32_t reserved;    ///< 0
} hs_rounded_layer;

/// Rounds weights so that the network's outputs change least, with unlabeled data.
///
/// Fold batch norms first, and equalize if scales are per tensor. Changes weights and biases; the
/// model remembers the grids, and a simulation made from it uses them. Without data (NULL, NULL, 0)
/// layers are rounded by what folded batch norms let expect of their inputs; the method has to be
/// HS_ROUNDING_AUTO or HS_ROUNDING_GRAM then.
/// @param[in,out] model unchanged if the call fails
/// @param[in] names inputs, `[count]`; NULL for no data
/// @param[in] values their values, `[N, ...]` each, `[count]`; read during the call only
/// @param[in] count number of inputs
/// @param[in] options may be NULL
/// @param[out] out_report owned by the caller, see hs_rounding_report_free(); may be NULL
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_CANCELLED, HS_ERR_EMPTY_STATISTICS, HS_ERR_INVALID_ARGUMENT,
/// HS_ERR_NON_FINITE_VALUE, HS_ERR_UNKNOWN_NAME, HS_ERR_SHAPE_MISMATCH,
/// HS_ERR_UNSUPPORTED_OPERATOR, HS_ERR_FILE_ACCESS for the temporary file
/// @since 0.1
hs_status hs_model_adaround(hs_model *model, const char *const *names, const hs_tensor_view *values,
                            size_t count, const hs_rounding_options *options,
                            hs_rounding_report **out_report, hs_error *error);

/// Corrects biases for what rounding to nearest does to the means of layers' outputs.
///
/// Weights stay as they are; quantize the model afterwards with the same options. A layer's bias
/// changes only if that brings the outputs of the quantized network nearer to those of the float
/// network on up to 32 samples from all over the data. Without data (NULL, NULL, 0) the means of
/// layers' inputs are those that folded batch norms let expect.
/// @param[in,out] model unchanged if the call fails
/// @param[in] names inputs, `[count]`; NULL for no data
/// @param[in] values their values, `[N, ...]` each, `[count]`; read during the call only
/// @param[in] count number of inputs
/// @param[in] options how the model will be quantized; may be NULL
/// @param[out] out_report owned by the caller, see hs_rounding_report_free(); may be NULL
/// @param[out] error may be NULL
/// @return as hs_model_adaround()
/// @since 0.1
hs_status hs_model_correct_biases(hs_model *model, const char *const *names,
                                  const hs_tensor_view *values, size_t count,
                                  const hs_rounding_options *options,
                                  hs_rounding_report **out_report, hs_error *error);

/// Number of layers.
/// @since 0.1
hs_status hs_rounding_report_count(const hs_rounding_report *report, size_t *out_count,
                                   hs_error *error);

/// One layer.
/// @param[in] report the report
/// @param[in] index less than the count
/// @param[out] out_layer lent until the report is freed
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_INVALID_ARGUMENT
/// @since 0.1
hs_status hs_rounding_report_get(const hs_rounding_report *report, size_t index,
                                 hs_rounded_layer *out_layer, hs_error *error);

/// Frees a report; NULL is a no-op.
/// @since 0.1
void hs_rounding_report_free(hs_rounding_report *report);

/// @}
// ------------------------------------------------------------------------------------------------
/// @defgroup encodings Encodings
/// @{

/// Which elements of a tensor share a scale.
/// @since 0.1
typedef int32_t hs_granularity;

enum {
  HS_GRANULARITY_PER_TENSOR = 0,   ///< One scale.
  HS_GRANULARITY_PER_CHANNEL = 1,  ///< One scale for each index along `axis`.
  HS_GRANULARITY_PER_BLOCK = 2     ///< One for each channel and run along `block_axis`.
};

/// The integer grid of a tensor: real = scale * (code - zero_point). 64 bytes, frozen.
/// @since 0.1
typedef struct hs_encoding {
  const float *scales;         ///< Positive and finite, `[count]`.
  const int32_t *zero_points;  ///< Codes that stand for 0, `[count]`.
  size_t count;                ///< 1, channels, or channels times blocks (row-major).
  int64_t block_size;          ///< Per block only; else 0.
  hs_granularity granularity;  ///< Which elements share a scale.
  int32_t axis;                ///< Channel axis; 0 if per tensor.
  int32_t block_axis;          ///< Per block only; else 0.
  int32_t bits;                ///< 2 to 16, or 32 for biases.
  int32_t is_signed;           ///< Codes start at -2^(bits-1), not at 0.
  int32_t is_symmetric;        ///< The quantizer was asked to be symmetric.
  int32_t is_strict;           ///< The lowest signed code is left out.
  int32_t reserved;            ///< 0
} hs_encoding;

/// Rounds floats to a grid and back, half to even.
/// @param[in] input float32 values of any layout
/// @param[in] encoding the grid; its groups must fit the input's shape
/// @param[out] out_values dense, row-major; may be the dense input's own memory, `[capacity]`
/// @param[in] capacity elements that `out_values` has; at least those of `input`
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_INVALID_ARGUMENT, HS_ERR_TYPE_MISMATCH, HS_ERR_SHAPE_MISMATCH
/// @since 0.1
hs_status hs_fake_quantize(const hs_tensor_view *input, const hs_encoding *encoding,
                           float *out_values, size_t capacity, hs_error *error);

/// Carries a gradient back through hs_fake_quantize(), to the input and to the ends of the range.
///
/// The input's gradient is the upstream one where the value rounds to a code of the grid, and 0
/// elsewhere. Range gradients are those of hs_encoding_from_range(), its roundings passed straight
/// through; they do not depend on the number of threads.
/// (Bhalgat et al., "LSQ+", 2020, arXiv:2004.09576, expressed in the ends of the range.)
/// @param[in] input float32 values that were quantized, of any layout
/// @param[in] encoding the grid, of 16 bits at most; its groups must fit the input's shape
/// @param[in] minimums lower ends as they were trained, `[encoding.count]`; NULL: the grid's own
/// @param[in] upstream float32 gradient of the result, of any layout and the input's shape
/// @param[out] out_input dense, row-major; may be the dense upstream's own memory, `[capacity]`
/// @param[in] capacity elements that `out_input` has; at least those of `input`
/// @param[out] out_minimums gradients of the lower ends, `[encoding.count]`; NULL if not wanted
/// @param[out] out_maximums gradients of the upper ends, `[encoding.count]`; NULL if not wanted
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_INVALID_ARGUMENT, HS_ERR_TYPE_MISMATCH, HS_ERR_SHAPE_MISMATCH
/// @since 0.1
hs_status hs_fake_quantize_backward(const hs_tensor_view *input, const hs_encoding *encoding,
                                    const float *minimums, const hs_tensor_view *upstream,
                                    float *out_input, size_t capacity, float *out_minimums,
                                    float *out_maximums, hs_error *error);

/// The grids between the ends of ranges, as range learning trains them.
///
/// The scale is `(maximum - minimum) / steps`, and at least 2^-23 or so. Zero points are 0 if
/// symmetric, else `round(-minimum / scale)` above the lowest code, half to even. Ends on the wrong
/// side of zero count as 0.
/// @param[in] minimums lower ends, finite, `[count]`
/// @param[in] maximums upper ends, finite, `[count]`
/// @param[in] count number of ranges, at least 1
/// @param[in] bits width of the codes, 2 to 16
/// @param[in] is_signed not 0: codes start at -2^(bits-1)
/// @param[in] is_symmetric not 0: zero points are 0
/// @param[in] is_strict not 0: the lowest signed code is left out
/// @param[out] out_scales positive steps, `[count]`
/// @param[out] out_zero_points codes that stand for 0, `[count]`
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_INVALID_ARGUMENT, HS_ERR_NON_FINITE_VALUE
/// @since 0.1
hs_status hs_encoding_from_range(const float *minimums, const float *maximums, size_t count,
                                 int32_t bits, int32_t is_signed, int32_t is_symmetric,
                                 int32_t is_strict, float *out_scales, int32_t *out_zero_points,
                                 hs_error *error);

/// Ends of ranges from which hs_encoding_from_range() makes exactly this encoding.
/// @param[in] encoding the grid
/// @param[out] out_minimums lower ends, `[encoding.count]`
/// @param[out] out_maximums upper ends, `[encoding.count]`
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_INVALID_ARGUMENT also if no range gives the grid: a symmetric one with a
///   zero point other than 0, one of 32 bits, or a scale below the least one
/// @since 0.1
hs_status hs_encoding_to_range(const hs_encoding *encoding, float *out_minimums,
                               float *out_maximums, hs_error *error);

/// @}
// ------------------------------------------------------------------------------------------------
/// @defgroup simulation Quantization simulation
/// @{

/// How a range is chosen from the values that a quantizer saw.
/// @since 0.1
typedef int32_t hs_range_scheme;

enum {
  HS_RANGE_SCHEME_MIN_MAX = 0,     ///< Smallest and largest value.
  HS_RANGE_SCHEME_SQNR = 1,        ///< Best signal-to-noise ratio (AIMET's "tf_enhanced").
  HS_RANGE_SCHEME_PERCENTILE = 2,  ///< Clips a share of the values at each end.
  HS_RANGE_SCHEME_MSE = 3,         ///< Least mean squared error.
  HS_RANGE_SCHEME_ENTROPY = 4      ///< Least divergence between the distributions.
};

/// A network simulated on integer hardware.
/// @since 0.1
typedef struct hs_simulation hs_simulation;

/// How to simulate.
/// @since 0.1
typedef struct hs_simulation_options {
  size_t struct_size;  ///< sizeof(hs_simulation_options)
  /// A built-in runtime configuration by name, or the path of a JSON file; NULL means
  /// "default_per_channel". "default" is per tensor.
  const char *configuration;
  double percentile;        ///< 50 to 100, for HS_RANGE_SCHEME_PERCENTILE; 0 means 100.
  hs_range_scheme scheme;   ///< How ranges are chosen.
  int32_t parameter_bits;   ///< Width of constants, 2 to 16; 0 means 8.
  int32_t activation_bits;  ///< Width of computed tensors, 2 to 16; 0 means 8.
  /// Input channels that share a scale, in weights of Conv, ConvTranspose, Gemm and MatMul that the
  /// configuration quantizes per channel; the last block may be smaller. 0: all of a channel.
  int32_t block_size;
  const char *const *excluded_layers;  ///< Names of nodes that stay unquantized; may be NULL.
  size_t excluded_layer_count;         ///< Length of `excluded_layers`.
} hs_simulation_options;

/// Fills in defaults; NULL is a no-op.
/// @since 0.1
void hs_simulation_options_init(hs_simulation_options *options);

/// Places quantizers in a network and chooses the grids of its constants.
/// @param[in] model copied (weights are shared); later changes of it do not reach the simulation
/// @param[in] options may be NULL
/// @param[out] out_simulation owned by the caller, see hs_simulation_free()
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_UNSUPPORTED_OPERATOR, HS_ERR_UNKNOWN_NAME, HS_ERR_INVALID_CONFIGURATION,
///   HS_ERR_NON_FINITE_VALUE, HS_ERR_INVALID_ARGUMENT
/// @since 0.1
hs_status hs_simulation_create(const hs_model *model, const hs_simulation_options *options,
                               hs_simulation **out_simulation, hs_error *error);

/// Frees a simulation; NULL is a no-op.
/// @since 0.1
void hs_simulation_free(hs_simulation *simulation);

/// Runs one batch with quantized constants and remembers the ranges of computed tensors.
/// @param[in,out] simulation its statistics are unchanged if the call fails
/// @param[in] names inputs, `[count]`
/// @param[in] values their values, `[count]`; read during the call only
/// @param[in] count number of inputs
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_UNKNOWN_NAME, HS_ERR_SHAPE_MISMATCH, HS_ERR_NON_FINITE_VALUE
/// @since 0.1
hs_status hs_simulation_observe(hs_simulation *simulation, const char *const *names,
                                const hs_tensor_view *values, size_t count, hs_error *error);

/// Remembers the values of one tensor of a run that was made elsewhere, such as in PyTorch.
///
/// Values of a tensor whose quantizer is off are let go.
/// @param[in,out] simulation its statistics are unchanged if the call fails
/// @param[in] tensor a computed tensor, or an input, that has a quantizer
/// @param[in] value what it held before quantization: float32, any shape; read during the call only
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_UNKNOWN_NAME, HS_ERR_INVALID_ARGUMENT for a constant,
///   HS_ERR_TYPE_MISMATCH, HS_ERR_NON_FINITE_VALUE
/// @since 0.1
hs_status hs_simulation_observe_value(hs_simulation *simulation, const char *tensor,
                                      const hs_tensor_view *value, hs_error *error);

/// Forgets what was observed; encodings stay.
/// @since 0.1
hs_status hs_simulation_reset_statistics(hs_simulation *simulation, hs_error *error);

/// Chooses the grids of computed tensors from what was observed.
/// @param[in,out] simulation its encodings are unchanged if the call fails
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_EMPTY_STATISTICS
/// @since 0.1
hs_status hs_simulation_compute_encodings(hs_simulation *simulation, hs_error *error);

/// How to go through calibration data.
/// @since 0.1
typedef struct hs_calibration_options {
  size_t struct_size;       ///< sizeof(hs_calibration_options)
  size_t batch_size;        ///< Rows a batch; 0 means 8. Results do not depend on it.
  hs_progress_fn progress;  ///< Called after each batch; may be NULL.
  void *user_data;          ///< Handed to `progress`.
} hs_calibration_options;

/// Fills in defaults; NULL is a no-op.
/// @since 0.1
void hs_calibration_options_init(hs_calibration_options *options);

/// Calibrates in one call: forgets what was observed, observes the data batch by batch along its
/// first dimension, and chooses the grids.
/// @param[in,out] simulation unchanged if the call fails or is cancelled
/// @param[in] names inputs, `[count]`
/// @param[in] values data of each input, all with the same number of rows `[N, …]`, `[count]`
/// @param[in] count number of inputs
/// @param[in] options may be NULL
/// @param[out] error may be NULL
/// @return as hs_simulation_observe(), and HS_ERR_CANCELLED, HS_ERR_EMPTY_STATISTICS
/// @since 0.1
hs_status hs_simulation_calibrate(hs_simulation *simulation, const char *const *names,
                                  const hs_tensor_view *values, size_t count,
                                  const hs_calibration_options *options, hs_error *error);

/// Runs the simulated network.
/// @param[in] simulation calibrated, or with loaded encodings
/// @param[in] names inputs, `[count]`
/// @param[in] values their values, `[count]`; read during the call only
/// @param[in] count number of inputs
/// @param[in] options may be NULL
/// @param[out] out_outputs outputs, then extra outputs; owned by the caller, see hs_tensors_free()
/// @param[out] error may be NULL
/// @return as hs_model_run(), and HS_ERR_INVALID_STATE before there are encodings
/// @since 0.1
hs_status hs_simulation_run(hs_simulation *simulation, const char *const *names,
                            const hs_tensor_view *values, size_t count,
                            const hs_run_options *options, hs_tensors **out_outputs,
                            hs_error *error);

/// @}
// ------------------------------------------------------------------------------------------------
/// @defgroup statistics Statistics across processes
/// @{

/// Number of bytes that hs_simulation_serialize_statistics() will write; kept for that call.
/// @since 0.1
hs_status hs_simulation_statistics_size(hs_simulation *simulation, size_t *out_size,
                                        hs_error *error);

/// Everything observed so far, to be merged elsewhere.
/// @param[in] simulation the simulation
/// @param[out] buffer at least hs_simulation_statistics_size() bytes, `[capacity]`
/// @param[in] capacity bytes that `buffer` has
/// @param[out] out_size bytes written
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_INVALID_ARGUMENT if the buffer is too small (it is then unchanged)
/// @since 0.1
hs_status hs_simulation_serialize_statistics(hs_simulation *simulation, void *buffer,
                                             size_t capacity, size_t *out_size, hs_error *error);

/// Adds what another simulation of the same network observed, in any order, with the same result.
/// @param[in,out] simulation its statistics are unchanged if the call fails
/// @param[in] data bytes from hs_simulation_serialize_statistics(), `[size]`
/// @param[in] size number of bytes
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_MALFORMED_FILE, HS_ERR_UNKNOWN_NAME
/// @since 0.1
hs_status hs_simulation_merge_statistics(hs_simulation *simulation, const void *data, size_t size,
                                         hs_error *error);

/// @}
// ------------------------------------------------------------------------------------------------
/// @defgroup quantizers Single quantizers
/// @{

/// What a quantizer sits on.
/// @since 0.1
typedef int32_t hs_quantizer_role;

enum {
  HS_QUANTIZER_ROLE_ACTIVATION = 0,  ///< A tensor that is computed, or a graph input.
  HS_QUANTIZER_ROLE_PARAMETER = 1    ///< A constant.
};

/// A tensor that is quantized; lent until the simulation is changed or freed.
/// @since 0.1
typedef struct hs_quantizer {
  const char *tensor;      ///< Name of the tensor.
  const char *tied_to;     ///< Tensor whose grid this one shares, or its own name.
  hs_quantizer_role role;  ///< Constant or computed.
  int32_t bits;            ///< Width of the codes.
  int32_t is_symmetric;    ///< Zero sits in the middle of the grid.
  int32_t is_enabled;      ///< 0: values pass through.
  int32_t is_frozen;       ///< Not 0: the grid may not change.
  int32_t has_encoding;    ///< 0 until the grid is known.
} hs_quantizer;

/// Number of quantizers.
/// @since 0.1
hs_status hs_simulation_quantizer_count(const hs_simulation *simulation, size_t *out_count,
                                        hs_error *error);

/// One quantizer, in the order in which the graph defines the tensors.
/// @param[in] simulation the simulation
/// @param[in] index less than the count
/// @param[out] out_quantizer lent until the simulation is changed or freed
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_INVALID_ARGUMENT
/// @since 0.1
hs_status hs_simulation_quantizer(hs_simulation *simulation, size_t index,
                                  hs_quantizer *out_quantizer, hs_error *error);

/// The grid of one tensor.
/// @param[in] simulation the simulation
/// @param[in] tensor a tensor that has a quantizer
/// @param[out] out_encoding lent until the simulation is changed or freed
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_UNKNOWN_NAME, HS_ERR_INVALID_STATE before there are encodings
/// @since 0.1
hs_status hs_simulation_encoding(hs_simulation *simulation, const char *tensor,
                                 hs_encoding *out_encoding, hs_error *error);

/// The grid that a constant would get if it held other values, such as after a training step.
/// @param[in] simulation nothing of it changes
/// @param[in] tensor a constant that has a quantizer
/// @param[in] value float32, of the constant's shape; read during the call only
/// @param[out] out_encoding lent until the next call of this function, or until the simulation is
///   changed or freed
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_UNKNOWN_NAME, HS_ERR_INVALID_ARGUMENT for a computed tensor,
///   HS_ERR_SHAPE_MISMATCH, HS_ERR_TYPE_MISMATCH, HS_ERR_NON_FINITE_VALUE
/// @since 0.1
hs_status hs_simulation_parameter_encoding(hs_simulation *simulation, const char *tensor,
                                           const hs_tensor_view *value, hs_encoding *out_encoding,
                                           hs_error *error);

/// Turns a quantizer on or off; one that comes on keeps its grid, if it has one.
/// @param[in,out] simulation the simulation
/// @param[in] tensor a tensor that has a quantizer
/// @param[in] is_enabled 0 for off
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_UNKNOWN_NAME
/// @since 0.1
hs_status hs_simulation_set_enabled(hs_simulation *simulation, const char *tensor,
                                    int32_t is_enabled, hs_error *error);

/// Keeps a grid as it is, or lets go of it; tensors that share a grid go together.
/// @param[in,out] simulation the simulation
/// @param[in] tensor a tensor that has a quantizer
/// @param[in] is_frozen 0 to let go
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_UNKNOWN_NAME, HS_ERR_INVALID_STATE if there is no grid to keep
/// @since 0.1
hs_status hs_simulation_set_frozen(hs_simulation *simulation, const char *tensor, int32_t is_frozen,
                                   hs_error *error);

/// Gives a tensor a grid; tensors that share a grid all get it.
/// @param[in,out] simulation the simulation
/// @param[in] tensor a tensor that has a quantizer
/// @param[in] encoding copied
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_UNKNOWN_NAME, HS_ERR_INVALID_STATE if frozen, HS_ERR_ENCODING_MISMATCH,
///   HS_ERR_INVALID_ARGUMENT
/// @since 0.1
hs_status hs_simulation_set_encoding(hs_simulation *simulation, const char *tensor,
                                     const hs_encoding *encoding, hs_error *error);

/// Changes width and symmetry of a quantizer and chooses its grid anew.
///
/// A computed tensor that has seen no data is left without a grid until encodings are computed.
/// @param[in,out] simulation the simulation
/// @param[in] tensor a tensor that has a quantizer
/// @param[in] bits 2 to 16; 0 leaves the width
/// @param[in] is_symmetric 0 or 1; -1 leaves the symmetry
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_UNKNOWN_NAME, HS_ERR_INVALID_STATE if frozen, HS_ERR_INVALID_ARGUMENT
/// @since 0.1
hs_status hs_simulation_set_precision(hs_simulation *simulation, const char *tensor, int32_t bits,
                                      int32_t is_symmetric, hs_error *error);

/// Holds a computed tensor's grid to bounds.
/// @param[in,out] simulation the simulation
/// @param[in] tensor a computed tensor that has a quantizer
/// @param[in] minimum lower bound; NaN leaves that end to the data
/// @param[in] maximum upper bound; NaN leaves that end to the data
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_UNKNOWN_NAME, HS_ERR_INVALID_STATE if frozen, HS_ERR_INVALID_ARGUMENT
/// @since 0.1
hs_status hs_simulation_set_range(hs_simulation *simulation, const char *tensor, double minimum,
                                  double maximum, hs_error *error);

/// @}
// ------------------------------------------------------------------------------------------------
/// @defgroup files Encodings and models for other tools
/// @{

/// Number of bytes that hs_simulation_encodings_json() will write; they are kept for that call.
/// @param[in] simulation calibrated, or with loaded encodings
/// @param[in] version "0.6.1", "1.0.0" or "2.0.0"; NULL means "1.0.0"
/// @param[out] out_size number of bytes
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_INVALID_STATE, HS_ERR_UNSUPPORTED_VERSION
/// @since 0.1
hs_status hs_simulation_encodings_size(hs_simulation *simulation, const char *version,
                                       size_t *out_size, hs_error *error);

/// Writes the encodings as AIMET's JSON, without a final NUL, to the caller's buffer.
/// @param[in] simulation calibrated, or with loaded encodings
/// @param[in] version "0.6.1", "1.0.0" or "2.0.0"; NULL means "1.0.0"
/// @param[out] buffer at least hs_simulation_encodings_size() bytes, `[capacity]`
/// @param[in] capacity bytes that `buffer` has
/// @param[out] out_size bytes written
/// @param[out] error may be NULL
/// @return as hs_simulation_encodings_size(); HS_ERR_INVALID_ARGUMENT if the buffer is too small
/// @since 0.1
hs_status hs_simulation_encodings_json(hs_simulation *simulation, const char *version, void *buffer,
                                       size_t capacity, size_t *out_size, hs_error *error);

/// Writes `<prefix>.onnx` (the network in float32) and `<prefix>.encodings` to a folder.
/// @param[in] simulation calibrated, or with loaded encodings
/// @param[in] directory a folder; it is created if its parent exists
/// @param[in] prefix a file name without folders
/// @param[in] version "0.6.1", "1.0.0" or "2.0.0"; NULL means "1.0.0"
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_FILE_ACCESS, HS_ERR_INVALID_STATE, HS_ERR_UNSUPPORTED_VERSION
/// @since 0.1
hs_status hs_simulation_export(hs_simulation *simulation, const char *directory, const char *prefix,
                               const char *version, hs_error *error);

/// How to write a model with QuantizeLinear and DequantizeLinear.
/// @since 0.1
typedef struct hs_qdq_options {
  size_t struct_size;              ///< sizeof(hs_qdq_options)
  int32_t prequantizes_constants;  ///< Not 0: constants are stored as integers.
  int32_t exports_int32_bias;      ///< Not 0: biases become 32-bit integers.
} hs_qdq_options;

/// Fills in defaults; NULL is a no-op.
/// @since 0.1
void hs_qdq_options_init(hs_qdq_options *options);

/// Writes an ONNX model whose QuantizeLinear and DequantizeLinear pairs carry the encodings.
/// @param[in] simulation calibrated, or with loaded encodings
/// @param[in] path file to write or replace
/// @param[in] options may be NULL
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_FILE_ACCESS, HS_ERR_INVALID_STATE
/// @since 0.1
hs_status hs_simulation_export_qdq(hs_simulation *simulation, const char *path,
                                   const hs_qdq_options *options, hs_error *error);

/// What did not match when encodings were loaded.
/// @since 0.1
typedef struct hs_load_report hs_load_report;

/// Kinds of mismatch.
/// @since 0.1
typedef int32_t hs_load_mismatch;

enum {
  HS_LOAD_MISMATCH_UNKNOWN = 0,   ///< The file names a tensor that has no quantizer here.
  HS_LOAD_MISMATCH_MISSING = 1,   ///< A quantizer here that the file does not name.
  HS_LOAD_MISMATCH_DIFFERENT = 2  ///< Tensor, property, expected, got.
};

/// Takes encodings from JSON of any version.
/// @param[in,out] simulation unchanged if the call fails
/// @param[in] data bytes of the file, `[size]`
/// @param[in] size number of bytes
/// @param[in] strict not 0: any mismatch is HS_ERR_ENCODING_MISMATCH
/// @param[out] out_report owned by the caller, see hs_load_report_free(); may be NULL if not wanted
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_MALFORMED_FILE, HS_ERR_UNSUPPORTED_VERSION, HS_ERR_ENCODING_MISMATCH
/// @since 0.1
hs_status hs_simulation_load_encodings(hs_simulation *simulation, const void *data, size_t size,
                                       int32_t strict, hs_load_report **out_report,
                                       hs_error *error);

/// Number of mismatches of a kind.
/// @since 0.1
hs_status hs_load_report_count(const hs_load_report *report, hs_load_mismatch kind,
                               size_t *out_count, hs_error *error);

/// One mismatch.
/// @param[in] report the report
/// @param[in] kind an `HS_LOAD_MISMATCH_` number
/// @param[in] index less than the count of that kind
/// @param[out] out_text tensor name, or a sentence for HS_LOAD_MISMATCH_DIFFERENT; lent until the
///   report is freed
/// @param[out] error may be NULL
/// @return HS_OK, HS_ERR_INVALID_ARGUMENT
/// @since 0.1
hs_status hs_load_report_get(const hs_load_report *report, hs_load_mismatch kind, size_t index,
                             const char **out_text, hs_error *error);

/// Frees a report; NULL is a no-op.
/// @since 0.1
void hs_load_report_free(hs_load_report *report);

/// @}

#ifdef __cplusplus
}
#endif
#endif
