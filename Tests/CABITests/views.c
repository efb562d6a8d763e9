// SPDX-License-Identifier: Apache-2.0
// Strided views: what is read, what is refused; borrowing; the fake-quantization kernel.

#include <math.h>

#include "support.h"

static const float scale = 0.5f;
static const int32_t zero_point = 0;

// Grid -8 ... 7 in steps of 0.5.
static hs_encoding grid(void) {
  hs_encoding encoding;
  memset(&encoding, 0, sizeof encoding);
  encoding.scales = &scale;
  encoding.zero_points = &zero_point;
  encoding.count = 1;
  encoding.bits = 4;
  encoding.is_signed = 1;
  encoding.is_symmetric = 1;
  return encoding;
}

static hs_tensor_view view_of(const void *data, int32_t rank, const int64_t *shape,
                              const int64_t *strides) {
  hs_tensor_view view = {data, shape, strides, HS_DATA_TYPE_FLOAT32, rank};
  return view;
}

static hs_status quantize(hs_tensor_view view, float *out, size_t capacity) {
  hs_encoding encoding = grid();
  return hs_fake_quantize(&view, &encoding, out, capacity, &last_error);
}

static void test_layouts(void) {
  // Worked by hand: 0.25/0.5 and 0.75/0.5 are ties and go to even codes 0 and 2; 100 clips to 7.
  const float values[6] = {0.25f, 0.75f, -1.1f, 100, -100, 0.3f};
  const float expected[6] = {0, 1, -1, 3.5f, -4, 0.5f};
  float out[6];
  const int64_t flat[1] = {6};
  CHECK_OK(quantize(view_of(values, 1, flat, NULL), out, 6));
  CHECK(memcmp(out, expected, sizeof out) == 0);

  // The transpose of [2, 3].
  const int64_t transposed[2] = {3, 2};
  const int64_t strides[2] = {4, 12};
  const float expected_transposed[6] = {0, 3.5f, 1, -4, -1, 0.5f};
  CHECK_OK(quantize(view_of(values, 2, transposed, strides), out, 6));
  CHECK(memcmp(out, expected_transposed, sizeof out) == 0);

  // Backwards, every second, and one value for all.
  const int64_t three[1] = {3};
  const int64_t backwards[1] = {-8};
  const float expected_backwards[3] = {-4, -1, 0};
  CHECK_OK(quantize(view_of(values + 4, 1, three, backwards), out, 3));
  CHECK(memcmp(out, expected_backwards, sizeof expected_backwards) == 0);
  const int64_t repeated[1] = {0};
  const float expected_repeated[3] = {1, 1, 1};
  CHECK_OK(quantize(view_of(values + 1, 1, three, repeated), out, 3));
  CHECK(memcmp(out, expected_repeated, sizeof expected_repeated) == 0);

  // Dense memory that is not aligned.
  char bytes[sizeof values + 1];
  memcpy(bytes + 1, values, sizeof values);
  CHECK_OK(quantize(view_of(bytes + 1, 1, flat, NULL), out, 6));
  CHECK(memcmp(out, expected, sizeof out) == 0);

  // Strides of extents of 1 mean nothing.
  const int64_t padded[3] = {1, 6, 1};
  const int64_t odd[3] = {12345, 4, -7};
  CHECK_OK(quantize(view_of(values, 3, padded, odd), out, 6));
  CHECK(memcmp(out, expected, sizeof out) == 0);

  // In place; a scalar; nothing at all.
  float own[6];
  memcpy(own, values, sizeof own);
  CHECK_OK(quantize(view_of(own, 1, flat, NULL), own, 6));
  CHECK(memcmp(own, expected, sizeof own) == 0);
  CHECK_OK(quantize(view_of(values + 3, 0, NULL, NULL), out, 1));
  CHECK(out[0] == 3.5f);
  const int64_t empty[2] = {0, 3};
  CHECK_OK(quantize(view_of(NULL, 2, empty, NULL), out, 0));

  // A channel each: scales 0.5 and 1.
  const float scales[2] = {0.5f, 1};
  const int32_t zeros[2] = {0, 0};
  const float expected_channels[6] = {0, 1, -1, 7, -8, 0};
  const int64_t matrix[2] = {2, 3};
  hs_encoding encoding = grid();
  encoding.scales = scales;
  encoding.zero_points = zeros;
  encoding.count = 2;
  encoding.granularity = HS_GRANULARITY_PER_CHANNEL;
  hs_tensor_view view = view_of(values, 2, matrix, NULL);
  CHECK_OK(hs_fake_quantize(&view, &encoding, out, 6, &last_error));
  CHECK(memcmp(out, expected_channels, sizeof out) == 0);
}

static void test_gradients(void) {
  // Grid -4 ... 3.5 in steps of 0.5. 0.25 rounds down by half a step, -1.1 up by 0.2, 0.3 by 0.4.
  const float values[6] = {0.25f, 0.75f, -1.1f, 100, -100, 0.3f};
  const float upstream[6] = {1, 2, 3, 4, 5, 6};
  const float expected[6] = {1, 2, 3, 0, 0, 6};
  const int64_t flat[1] = {6};
  hs_encoding encoding = grid();
  hs_tensor_view view = view_of(values, 1, flat, NULL);
  hs_tensor_view above = view_of(upstream, 1, flat, NULL);
  float out[6];
  float minimum, maximum;
  CHECK_OK(hs_fake_quantize_backward(&view, &encoding, NULL, &above, out, 6, &minimum, &maximum,
                                     &last_error));
  CHECK(memcmp(out, expected, sizeof out) == 0);
  // Over 15 steps: -0.5*1 + 0.5*2 + 0.2*3 + 7*4 - 8*5 + 0.4*6 = -8.5. Quotients are floats.
  CHECK(fabs(maximum - -8.5 / 15) < 1e-6 && minimum == -maximum);
  // Neither gradient of the range is wanted; the result takes the place of the upstream gradient.
  float both[6];
  memcpy(both, upstream, sizeof both);
  above.data = both;
  CHECK_OK(
      hs_fake_quantize_backward(&view, &encoding, NULL, &above, both, 6, NULL, NULL, &last_error));
  CHECK(memcmp(both, expected, sizeof both) == 0);

  above.data = upstream;
  out[0] = 42;
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT, hs_fake_quantize_backward(&view, &encoding, NULL, &above,
                                                                  out, 5, NULL, NULL, &last_error));
  const int64_t five[1] = {5};
  above.shape = five;
  CHECK_STATUS(HS_ERR_SHAPE_MISMATCH, hs_fake_quantize_backward(&view, &encoding, NULL, &above, out,
                                                                6, NULL, NULL, &last_error));
  above.shape = flat;
  above.dtype = HS_DATA_TYPE_INT32;
  CHECK_STATUS(HS_ERR_TYPE_MISMATCH, hs_fake_quantize_backward(&view, &encoding, NULL, &above, out,
                                                               6, NULL, NULL, &last_error));
  CHECK(out[0] == 42);
}

static void test_ranges(void) {
  const float minimums[2] = {-1, -0.5f};
  const float maximums[2] = {2, 2.5f};
  float scales[2];
  int32_t zero_points[2];
  CHECK_OK(
      hs_encoding_from_range(minimums, maximums, 2, 4, 0, 0, 0, scales, zero_points, &last_error));
  CHECK(scales[0] == 0.2f && scales[1] == 0.2f && zero_points[0] == 5 && zero_points[1] == 2);
  hs_encoding encoding = grid();
  encoding.scales = scales;
  encoding.zero_points = zero_points;
  encoding.count = 2;
  encoding.is_signed = encoding.is_symmetric = 0;
  float low[2], high[2];
  CHECK_OK(hs_encoding_to_range(&encoding, low, high, &last_error));
  CHECK(low[0] == -1 && high[0] == 2 && low[1] == -0.4f && fabsf(high[1] - 2.6f) < 1e-6f);

  const float bad[2] = {0, NAN};
  CHECK_STATUS(HS_ERR_NON_FINITE_VALUE, hs_encoding_from_range(minimums, bad, 2, 4, 0, 0, 0, scales,
                                                               zero_points, &last_error));
  const int32_t widths[] = {1, 17, 32, INT32_MIN, INT32_MAX};
  for (size_t index = 0; index < sizeof widths / sizeof *widths; ++index) {
    CHECK_STATUS(HS_ERR_INVALID_ARGUMENT,
                 hs_encoding_from_range(minimums, maximums, 2, widths[index], 0, 0, 0, scales,
                                        zero_points, &last_error));
  }
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT, hs_encoding_from_range(minimums, maximums, 0, 4, 0, 0, 0,
                                                               scales, zero_points, &last_error));
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT,
               hs_encoding_from_range(minimums, maximums, SIZE_MAX, 4, 0, 0, 0, scales, zero_points,
                                      &last_error));
  encoding.bits = 32;
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT, hs_encoding_to_range(&encoding, low, high, &last_error));
}

static void refused(hs_status expected, hs_tensor_view view) {
  float out[8] = {42};
  CHECK_STATUS(expected, quantize(view, out, 8));
  CHECK(out[0] == 42);
}

static void test_refusals(void) {
  const float values[8] = {0};
  const int64_t shape[33] = {1, 1, 1};
  const int64_t negative[1] = {-1};
  const int64_t huge[3] = {INT64_MAX, INT64_MAX, 2};
  const int64_t hidden[3] = {INT64_MAX, 0, INT64_MAX};
  const int64_t large[1] = {(int64_t)1 << 47};
  const int64_t two[2] = {2, 2};
  const int64_t far[2] = {INT64_MAX, 4};
  const int64_t low[2] = {INT64_MIN, INT64_MIN};
  const int64_t wraps[2] = {INT64_MAX / 2 + 1, INT64_MAX / 2 + 1};

  refused(HS_ERR_INVALID_ARGUMENT, view_of(values, -1, shape, NULL));
  refused(HS_ERR_INVALID_ARGUMENT, view_of(values, 33, shape, NULL));
  refused(HS_ERR_INVALID_ARGUMENT, view_of(values, INT32_MAX, shape, NULL));
  refused(HS_ERR_INVALID_ARGUMENT, view_of(values, INT32_MIN, shape, NULL));
  refused(HS_ERR_INVALID_ARGUMENT, view_of(values, 1, NULL, NULL));
  refused(HS_ERR_INVALID_ARGUMENT, view_of(values, 1, negative, NULL));
  refused(HS_ERR_INVALID_ARGUMENT, view_of(values, 3, huge, NULL));
  refused(HS_ERR_INVALID_ARGUMENT, view_of(values, 3, hidden, NULL));
  refused(HS_ERR_INVALID_ARGUMENT, view_of(NULL, 2, two, NULL));
  refused(HS_ERR_INVALID_ARGUMENT, view_of(NULL, 0, NULL, NULL));
  refused(HS_ERR_INVALID_ARGUMENT, view_of(values, 2, two, far));
  refused(HS_ERR_INVALID_ARGUMENT, view_of(values, 2, two, low));
  refused(HS_ERR_INVALID_ARGUMENT, view_of(values, 2, two, wraps));
  // Larger than the buffer for the result: refused before anything is read.
  refused(HS_ERR_INVALID_ARGUMENT, view_of(values, 1, large, NULL));
  refused(HS_ERR_INVALID_ARGUMENT, view_of((const void *)UINTPTR_MAX, 1, large, NULL));

  hs_tensor_view view = view_of(values, 2, two, NULL);
  view.dtype = HS_DATA_TYPE_INT32;
  refused(HS_ERR_TYPE_MISMATCH, view);
  view.dtype = HS_DATA_TYPE_STRING;
  refused(HS_ERR_TYPE_MISMATCH, view);
  const hs_data_type unknown[] = {0, -1, 27, 1000, INT32_MIN};
  for (size_t index = 0; index < sizeof unknown / sizeof *unknown; ++index) {
    view.dtype = unknown[index];
    refused(HS_ERR_INVALID_ARGUMENT, view);
  }
  view.dtype = HS_DATA_TYPE_INT4;
  view.strides = far;
  refused(HS_ERR_INVALID_ARGUMENT, view);

  // Output: too small, not aligned.
  float out[8];
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT, quantize(view_of(values, 2, two, NULL), out, 3));
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT,
               quantize(view_of(values, 2, two, NULL), (float *)((char *)out + 1), 7));
}

static void test_encodings(void) {
  const float values[4] = {1, 2, 3, 4};
  const int64_t two[2] = {2, 2};
  const float bad_scales[] = {0, -1, NAN, INFINITY};
  hs_tensor_view view = view_of(values, 2, two, NULL);
  float out[4];
  hs_encoding encoding;
#define BAD(change)                                                                             \
  do {                                                                                          \
    encoding = grid();                                                                          \
    change;                                                                                     \
    CHECK(hs_fake_quantize(&view, &encoding, out, 4, &last_error) == HS_ERR_INVALID_ARGUMENT || \
          last_error.status == HS_ERR_SHAPE_MISMATCH);                                          \
  } while (0)
  for (size_t index = 0; index < 4; ++index) BAD(encoding.scales = &bad_scales[index]);
  const int32_t outside = 8;
  const int32_t lowest = INT32_MIN;
  BAD(encoding.zero_points = &outside);
  BAD(encoding.zero_points = &lowest);
  BAD(encoding.scales = NULL);
  BAD(encoding.zero_points = NULL);
  BAD(encoding.count = 0);
  BAD(encoding.count = SIZE_MAX);
  BAD(encoding.bits = 1);
  BAD(encoding.bits = 17);
  BAD(encoding.bits = INT32_MIN);
  BAD(encoding.granularity = 3);
  BAD(encoding.granularity = -1);
  BAD(encoding.granularity = HS_GRANULARITY_PER_CHANNEL);
  BAD(encoding.granularity = HS_GRANULARITY_PER_CHANNEL; encoding.axis = -1);
  BAD(encoding.granularity = HS_GRANULARITY_PER_CHANNEL; encoding.axis = INT32_MAX);
  BAD(encoding.granularity = HS_GRANULARITY_PER_BLOCK; encoding.block_axis = 1);
  BAD(encoding.granularity = HS_GRANULARITY_PER_BLOCK; encoding.block_axis = 1;
      encoding.block_size = INT64_MAX);
  BAD(encoding.granularity = HS_GRANULARITY_PER_BLOCK; encoding.block_axis = 1;
      encoding.block_size = INT64_MIN);
}

static void count_release(void *user_data) { ++*(int *)user_data; }

static void test_borrowing(void) {
  hs_model *model = open_model();
  hs_tensors *constants = NULL;
  CHECK_OK(hs_model_initializers(model, &constants, &last_error));
  hs_tensor_view old;
  CHECK_OK(hs_tensors_find(constants, "classifier.bias", &old, &last_error));
  CHECK(old.rank == 1 && old.shape[0] == 4 && old.strides == NULL);

  const float bias[4] = {1, 2, 3, 4};
  const int64_t four[1] = {4};
  const int64_t three[1] = {3};
  int released = 0;
  hs_tensor_view value = view_of(bias, 1, four, NULL);
  hs_tensor_view short_value = view_of(bias, 1, three, NULL);
  const int64_t backwards[1] = {-4};
  hs_tensor_view reversed = view_of(bias + 3, 1, four, backwards);
  hs_tensor_view shifted = view_of((const char *)bias + 1, 1, three, NULL);

  // A failure does not take the memory.
  CHECK_STATUS(HS_ERR_SHAPE_MISMATCH,
               hs_model_set_initializer_borrowed(model, "classifier.bias", &short_value,
                                                 count_release, &released, &last_error));
  CHECK_STATUS(HS_ERR_UNKNOWN_NAME,
               hs_model_set_initializer_borrowed(model, "no", &value, count_release, &released,
                                                 &last_error));
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT,
               hs_model_set_initializer_borrowed(model, "classifier.bias", &reversed, count_release,
                                                 &released, &last_error));
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT,
               hs_model_set_initializer_borrowed(model, "classifier.bias", &shifted, count_release,
                                                 &released, &last_error));
  CHECK(released == 0);

  // Borrowed memory is the model's own: no copy. It is released when the last user is gone.
  CHECK_OK(hs_model_set_initializer_borrowed(model, "classifier.bias", &value, count_release,
                                             &released, &last_error));
  hs_tensors *borrowed = NULL;
  CHECK_OK(hs_model_initializers(model, &borrowed, &last_error));
  hs_tensor_view seen;
  CHECK_OK(hs_tensors_find(borrowed, "classifier.bias", &seen, &last_error));
  CHECK(seen.data == bias);
  CHECK(released == 0);
  hs_tensors_free(borrowed);
  CHECK(released == 0);
  // Replaced by a copy of a strided view.
  CHECK_OK(hs_model_set_initializer(model, "classifier.bias", &reversed, &last_error));
  CHECK(released == 1);
  CHECK_OK(hs_model_initializers(model, &borrowed, &last_error));
  CHECK_OK(hs_tensors_find(borrowed, "classifier.bias", &seen, &last_error));
  const float expected[4] = {4, 3, 2, 1};
  CHECK(memcmp(seen.data, expected, sizeof expected) == 0);
  hs_tensors_free(borrowed);

  // Taken out, the constant is an input; put back, it is the same model.
  hs_tensors *taken = NULL;
  CHECK_OK(hs_model_take_initializer(model, "classifier.bias", &taken, &last_error));
  CHECK_OK(hs_tensors_find(taken, "classifier.bias", &seen, &last_error));
  CHECK(memcmp(seen.data, expected, sizeof expected) == 0);
  size_t input_count = 0;
  CHECK_OK(hs_model_input_count(model, &input_count, &last_error));
  CHECK(input_count == 2);
  hs_tensors *again = NULL;
  CHECK_STATUS(HS_ERR_UNKNOWN_NAME,
               hs_model_take_initializer(model, "classifier.bias", &again, &last_error));
  CHECK(again == NULL);
  CHECK_OK(hs_model_set_initializer(model, "classifier.bias", &seen, &last_error));
  hs_tensors_free(taken);
  CHECK_OK(hs_model_input_count(model, &input_count, &last_error));
  CHECK(input_count == 1);

  // Written through the collection, the model's own constant stays.
  size_t position = 0;
  const char *name = NULL;
  CHECK_OK(hs_model_initializers(model, &borrowed, &last_error));
  while (hs_tensors_get(borrowed, position, &name, &seen, &last_error) == HS_OK &&
         strcmp(name, "classifier.bias") != 0) {
    ++position;
  }
  void *memory = NULL;
  CHECK_OK(hs_tensors_get_mutable(borrowed, position, &memory, &last_error));
  if (memory != NULL) memset(memory, 0, sizeof expected);
  hs_tensors_free(borrowed);
  CHECK_OK(hs_model_initializers(model, &borrowed, &last_error));
  CHECK_OK(hs_tensors_find(borrowed, "classifier.bias", &seen, &last_error));
  CHECK(memcmp(seen.data, expected, sizeof expected) == 0);
  hs_tensors_free(borrowed);

  // The first collection still shows what it showed.
  CHECK(memcmp(old.data, expected, sizeof expected) != 0);
  hs_tensors_free(constants);
  hs_model_free(model);
}

// Memory that the library may write to is where constants change; without that, they move.
static void test_lending(void) {
  for (int lends = 0; lends < 2; ++lends) {
    hs_model *model = open_model();
    hs_tensors *constants = NULL;
    hs_tensor_view view;
    CHECK_OK(hs_model_initializers(model, &constants, &last_error));
    CHECK_OK(hs_tensors_find(constants, "stem.weight", &view, &last_error));
    size_t size = sizeof(float);
    for (int32_t axis = 0; axis < view.rank; ++axis) size *= (size_t)view.shape[axis];
    float *memory = malloc(size);
    if (memory == NULL) abort();
    memcpy(memory, view.data, size);
    hs_tensor_view lent = view_of(memory, view.rank, view.shape, NULL);
    int released = 0;
    CHECK_OK((lends ? hs_model_set_initializer_lent : hs_model_set_initializer_borrowed)(
        model, "stem.weight", &lent, count_release, &released, &last_error));
    CHECK_OK(hs_model_fold_batch_norms(model, NULL, &last_error));
    hs_tensors *taken = NULL;
    hs_tensor_view folded;
    CHECK_OK(hs_model_take_initializer(model, "stem.weight", &taken, &last_error));
    CHECK_OK(hs_tensors_find(taken, "stem.weight", &folded, &last_error));
    CHECK((folded.data == memory) == lends);
    CHECK((memcmp(memory, view.data, size) != 0) == lends);
    CHECK(memcmp(folded.data, view.data, size) != 0);
    CHECK(released == !lends);
    hs_tensors_free(taken);
    CHECK(released == 1);
    free(memory);
    hs_tensors_free(constants);
    hs_model_free(model);
  }
}

void test_views(void) {
  test_layouts();
  test_refusals();
  test_encodings();
  test_gradients();
  test_ranges();
  test_borrowing();
  test_lending();
}
