// SPDX-License-Identifier: Apache-2.0
// Halfstep's C++17 interface: owning classes and exceptions over halfstep.h, header only.
#ifndef HALFSTEP_HPP
#define HALFSTEP_HPP

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "halfstep.h"

/// Makes trained networks fit for integer hardware.
///
/// Classes own what they hold, move, and throw halfstep::Error where the C function fails. One
/// object is used by one thread at a time.
namespace halfstep {

/// A failure; `what()` names the culprit.
class Error : public std::runtime_error {
 public:
  explicit Error(const hs_error &error)
      : std::runtime_error(error.message), status_(error.status) {}

  /// An `HS_ERR_` number.
  hs_status status() const noexcept { return status_; }

 private:
  hs_status status_;
};

namespace detail {

/// Calls a C function with a trailing error and throws what it reports.
template <typename Function, typename... Arguments>
void call(Function function, Arguments... arguments) {
  hs_error error = {};
  if (function(arguments..., &error) != HS_OK) throw Error(error);
}

/// Calls a C function that ends in an out-parameter and an error.
template <typename Result, typename Function, typename... Arguments>
Result get(Function function, Arguments... arguments) {
  Result result = {};
  call(function, arguments..., &result);
  return result;
}

template <typename Handle, void (*Free)(Handle *)>
struct Deleter {
  void operator()(Handle *handle) const noexcept { Free(handle); }
};
template <typename Handle, void (*Free)(Handle *)>
using Owner = std::unique_ptr<Handle, Deleter<Handle, Free>>;

inline std::string text(const char *text) { return text == nullptr ? std::string() : text; }

}  // namespace detail

/// Told how many steps of how many are done; false cancels.
using Progress = std::function<bool(std::size_t completed, std::size_t total)>;

namespace detail {

/// A progress function as the C functions take it; what it throws comes out of call().
class RawProgress {
 public:
  explicit RawProgress(Progress progress) : progress_(std::move(progress)) {}

  hs_progress_fn function() const noexcept { return progress_ ? report : nullptr; }

  /// Makes a call that reports to this object, which `user_data` must point to.
  template <typename Call>
  auto call(Call call) -> decltype(call()) {
    try {
      return call();
    } catch (const Error &) {
      if (failure_) std::rethrow_exception(failure_);
      throw;
    }
  }

 private:
  static int32_t report(std::size_t completed, std::size_t total, void *user_data) {
    auto *self = static_cast<RawProgress *>(user_data);
    try {
      return self->progress_(completed, total) ? 0 : 1;
    } catch (...) {
      self->failure_ = std::current_exception();
      return 1;
    }
  }

  Progress progress_;
  std::exception_ptr failure_;
};

}  // namespace detail

/// Version of the library, such as "0.1.0".
inline std::string version() { return hs_version(); }

/// Sets how many threads calls of this library use; 0 for the default.
inline void set_thread_count(int32_t count) { detail::call(hs_set_thread_count, count); }

/// Threads that a call from this thread would use.
inline int32_t thread_count() { return hs_thread_count(); }

/// The element type that stands for a C++ type.
template <typename T>
struct DataTypeOf;
template <>
struct DataTypeOf<float> {
  static constexpr hs_data_type value = HS_DATA_TYPE_FLOAT32;
};
template <>
struct DataTypeOf<double> {
  static constexpr hs_data_type value = HS_DATA_TYPE_FLOAT64;
};
template <>
struct DataTypeOf<uint8_t> {
  static constexpr hs_data_type value = HS_DATA_TYPE_UINT8;
};
template <>
struct DataTypeOf<int8_t> {
  static constexpr hs_data_type value = HS_DATA_TYPE_INT8;
};
template <>
struct DataTypeOf<int32_t> {
  static constexpr hs_data_type value = HS_DATA_TYPE_INT32;
};
template <>
struct DataTypeOf<int64_t> {
  static constexpr hs_data_type value = HS_DATA_TYPE_INT64;
};

/// An array that somebody else owns: what calls read, and what they lend.
class TensorView {
 public:
  /// Dense row-major memory, `shape`'s product of elements.
  template <typename T>
  TensorView(const T *data, std::vector<int64_t> shape)
      : TensorView(data, DataTypeOf<T>::value, std::move(shape), {}) {}

  /// Memory of any layout; strides in bytes, empty for dense.
  TensorView(const void *data, hs_data_type type, std::vector<int64_t> shape,
             std::vector<int64_t> strides)
      : data_(data), type_(type), shape_(std::move(shape)), strides_(std::move(strides)) {}

  /// Copies the numbers of a C view, not what `data` points to.
  explicit TensorView(const hs_tensor_view &view)
      : data_(view.data),
        type_(view.dtype),
        shape_(view.shape, view.shape == nullptr ? view.shape : view.shape + view.rank) {
    if (view.strides != nullptr) strides_.assign(view.strides, view.strides + view.rank);
  }

  const void *data() const noexcept { return data_; }
  hs_data_type type() const noexcept { return type_; }
  const std::vector<int64_t> &shape() const noexcept { return shape_; }

  /// Number of elements.
  std::size_t count() const noexcept {
    std::size_t count = 1;
    for (int64_t extent : shape_) count *= static_cast<std::size_t>(extent);
    return count;
  }

  /// Elements as a C++ type; throws std::invalid_argument if they are of another.
  template <typename T>
  const T *as() const {
    if (type_ != DataTypeOf<T>::value) throw std::invalid_argument("tensor: other element type");
    return static_cast<const T *>(data_);
  }

  /// The C view; valid while this object is neither changed nor destroyed.
  hs_tensor_view raw() const noexcept {
    return {data_, shape_.data(), strides_.empty() ? nullptr : strides_.data(), type_,
            static_cast<int32_t>(shape_.size())};
  }

 private:
  const void *data_;
  hs_data_type type_;
  std::vector<int64_t> shape_;
  std::vector<int64_t> strides_;
};

/// Inputs of a run by name.
using Inputs = std::vector<std::pair<std::string, TensorView>>;

namespace detail {

/// Inputs as the C functions take them; must not outlive the inputs.
struct RawInputs {
  explicit RawInputs(const Inputs &inputs) {
    for (const auto &[name, view] : inputs) {
      names.push_back(name.c_str());
      views.push_back(view.raw());
    }
  }
  std::vector<const char *> names;
  std::vector<hs_tensor_view> views;
};

/// Extra outputs as the C functions take them.
struct RawRunOptions {
  explicit RawRunOptions(const std::vector<std::string> &extra_outputs) {
    for (const auto &name : extra_outputs) names.push_back(name.c_str());
    hs_run_options_init(&options);
    options.extra_outputs = names.data();
    options.extra_output_count = names.size();
  }
  std::vector<const char *> names;
  hs_run_options options;
};

}  // namespace detail

/// Named tensors in a fixed order; owns them.
class Tensors {
 public:
  explicit Tensors(hs_tensors *handle) : handle_(handle) {}

  /// Reads an `.npz`, or an `.npy`, whose array is named "".
  static Tensors open_numpy(const std::string &path) {
    return Tensors(detail::get<hs_tensors *>(hs_tensors_open_numpy, path.c_str()));
  }

  std::size_t size() const { return detail::get<std::size_t>(hs_tensors_count, handle_.get()); }

  /// Name by position.
  std::string name(std::size_t index) const { return detail::text(at(index).first); }

  /// Tensor by position; its data lives as long as this object.
  TensorView operator[](std::size_t index) const { return TensorView(at(index).second); }

  /// Tensor by name; its data lives as long as this object.
  TensorView operator[](const std::string &name) const {
    return TensorView(detail::get<hs_tensor_view>(hs_tensors_find, handle_.get(), name.c_str()));
  }

  hs_tensors *get() const noexcept { return handle_.get(); }

 private:
  std::pair<const char *, hs_tensor_view> at(std::size_t index) const {
    std::pair<const char *, hs_tensor_view> result = {};
    detail::call(hs_tensors_get, handle_.get(), index, &result.first, &result.second);
    return result;
  }

  detail::Owner<hs_tensors, hs_tensors_free> handle_;
};

/// Declared name, type and shape of an input or output.
struct ValueInfo {
  std::string name;
  hs_data_type type;           ///< 0 if not declared.
  bool has_shape;              ///< Whether even the rank is declared.
  std::vector<int64_t> shape;  ///< -1 where not fixed.
};

/// A fold of a batch norm into a layer.
struct Fold {
  std::string layer;
  std::string batch_norm;
  bool is_forward;
};

/// Layers that were equalized together, and what each tensor between them was divided by.
struct EqualizedSet {
  std::vector<std::string> layers;
  std::vector<std::vector<float>> factors;
};

/// What equalization did.
struct EqualizationReport {
  std::size_t iterations;
  std::vector<EqualizedSet> sets;
};

/// How to equalize.
struct EqualizationOptions {
  bool absorbs_high_biases = false;  ///< May change the function.
  int32_t maximum_iterations = 50;
};

/// What rounding aims at and may use; zeros and empty texts mean the library's defaults.
struct RoundingOptions {
  hs_rounding_method method = HS_ROUNDING_AUTO;
  int32_t parameter_bits = 0;   ///< 2 to 16; 0 means 4, or 8 for bias correction.
  int32_t activation_bits = 0;  ///< 2 to 16 while rounding; 0 means 8, 32 keeps them in float.
  hs_range_scheme scheme = HS_RANGE_SCHEME_MIN_MAX;
  double percentile = 0;
  std::string configuration;  ///< Built-in name or path of a JSON file.
  std::vector<std::string> excluded_layers;
  std::size_t maximum_rows = 0;
  std::size_t maximum_bytes = 0;
  uint64_t seed = 0;
  bool floor_or_ceil = false;
  int32_t iterations = 0;  ///< Of HS_ROUNDING_GRADIENT, for each layer.
  std::string cache;  ///< Folder that results of layers are kept in, to resume; empty for none.
  int32_t block_size = 0;  ///< Input channels that share a scale of a weight; 0: all of a channel.
  double regularization = 0;  ///< Of HS_ROUNDING_GRADIENT; 0 means 0.01, a negative number none.
  double beta_start = 0;      ///< Exponent of the regularizer when it sets in; 0 means 20.
  double beta_end = 0;        ///< Its exponent at the end; 0 means 2.
  double warm_start = 0;      ///< Share of the iterations without it; 0 means 0.2, negative none.
  int32_t candidates = 0;     ///< Scales that HS_ROUNDING_SEQUENTIAL_MSE tries; 0 means 20.
  std::vector<std::pair<std::string, int32_t>> layer_bits;  ///< Widths of single layers' weights.
};

/// What rounding made of a layer.
struct RoundedLayer {
  std::string layer;
  std::string weight;
  std::string kept;     ///< How the kept weights were found.
  double noise_before;  ///< Noise over signal on held-out rows, rounded to nearest.
  double noise_after;   ///< Noise over signal with what was kept.
  int32_t bits;
};

/// A layer that has a weight.
struct Layer {
  std::string name;
  std::string op_type;
  std::string weight;
  std::vector<float> channel_minimum;
  std::vector<float> channel_maximum;
};

/// A trained network.
class Model {
 public:
  explicit Model(hs_model *handle) : handle_(handle) {}

  /// Reads an ONNX model, and its external data from the file's folder.
  static Model open(const std::string &path) {
    return Model(detail::get<hs_model *>(hs_model_open, path.c_str(),
                                         static_cast<const hs_open_options *>(nullptr)));
  }

  /// Reads an ONNX model from memory.
  static Model open_memory(const void *data, std::size_t size) {
    return Model(detail::get<hs_model *>(hs_model_open_memory, data, size,
                                         static_cast<const hs_open_options *>(nullptr)));
  }

  Model clone() const { return Model(detail::get<hs_model *>(hs_model_clone, handle_.get())); }

  /// Writes the model as ONNX.
  void save(const std::string &path, bool external_data = false) const {
    hs_save_options options;
    hs_save_options_init(&options);
    options.external_data = external_data;
    detail::call(hs_model_save, handle_.get(), path.c_str(), &options);
  }

  /// The bytes of an ONNX file.
  std::vector<unsigned char> serialize() {
    std::vector<unsigned char> bytes(
        detail::get<std::size_t>(hs_model_serialized_size, handle_.get()) + 1);
    auto size = detail::get<std::size_t>(hs_model_serialize, handle_.get(),
                                         static_cast<void *>(bytes.data()), bytes.size());
    bytes.resize(size);
    return bytes;
  }

  std::vector<ValueInfo> inputs() { return infos(hs_model_input_count, hs_model_input); }
  std::vector<ValueInfo> outputs() { return infos(hs_model_output_count, hs_model_output); }

  /// Constants as they are now.
  Tensors initializers() const {
    return Tensors(detail::get<hs_tensors *>(hs_model_initializers, handle_.get()));
  }

  /// Replaces a constant with a copy of a value.
  void set_initializer(const std::string &name, const TensorView &value) {
    hs_tensor_view view = value.raw();
    detail::call(hs_model_set_initializer, handle_.get(), name.c_str(), &view);
  }

  /// Takes a constant out of the model, which then asks for it as an input.
  Tensors take_initializer(const std::string &name) {
    return Tensors(
        detail::get<hs_tensors *>(hs_model_take_initializer, handle_.get(), name.c_str()));
  }

  /// Runs the network in float arithmetic.
  Tensors run(const Inputs &inputs, const std::vector<std::string> &extra_outputs = {}) {
    detail::RawInputs raw(inputs);
    detail::RawRunOptions options(extra_outputs);
    return Tensors(detail::get<hs_tensors *>(hs_model_run, handle_.get(), raw.names.data(),
                                             raw.views.data(), raw.names.size(), &options.options));
  }

  /// Folds batch norms into the layers beside them.
  std::vector<Fold> fold_batch_norms() {
    detail::Owner<hs_fold_report, hs_fold_report_free> report(
        detail::get<hs_fold_report *>(hs_model_fold_batch_norms, handle_.get()));
    std::vector<Fold> folds;
    auto count = detail::get<std::size_t>(hs_fold_report_count, report.get());
    for (std::size_t index = 0; index < count; ++index) {
      auto fold = detail::get<hs_fold>(hs_fold_report_get, report.get(), index);
      folds.push_back({fold.layer, fold.batch_norm, fold.is_forward != 0});
    }
    return folds;
  }

  /// Balances the weight ranges of consecutive layers.
  EqualizationReport equalize(const EqualizationOptions &options = {}, Progress progress = {}) {
    detail::RawProgress reporter(std::move(progress));
    hs_equalization_options raw;
    hs_equalization_options_init(&raw);
    raw.absorbs_high_biases = options.absorbs_high_biases;
    raw.maximum_iterations = options.maximum_iterations;
    raw.progress = reporter.function();
    raw.user_data = &reporter;
    detail::Owner<hs_equalization_report, hs_equalization_report_free> report(reporter.call([&] {
      return detail::get<hs_equalization_report *>(hs_model_equalize, handle_.get(), &raw);
    }));
    EqualizationReport result = {};
    result.iterations = detail::get<std::size_t>(hs_equalization_report_iterations, report.get());
    auto count = detail::get<std::size_t>(hs_equalization_report_count, report.get());
    for (std::size_t index = 0; index < count; ++index) {
      auto set = detail::get<hs_equalized_set>(hs_equalization_report_get, report.get(), index);
      EqualizedSet copy;
      copy.layers.assign(set.layers, set.layers + set.layer_count);
      for (std::size_t list = 0; list < set.factor_count; ++list) {
        copy.factors.emplace_back(set.factors[list], set.factors[list] + set.channel_counts[list]);
      }
      result.sets.push_back(std::move(copy));
    }
    return result;
  }

  /// Rounds weights so that the network's outputs change least, with unlabeled data.
  std::vector<RoundedLayer> adaround(const Inputs &data, const RoundingOptions &options = {},
                                     Progress progress = {}) {
    return rounded(hs_model_adaround, &data, options, std::move(progress));
  }

  /// Rounds weights without data, by what folded batch norms let expect.
  std::vector<RoundedLayer> adaround(const RoundingOptions &options = {}, Progress progress = {}) {
    return rounded(hs_model_adaround, nullptr, options, std::move(progress));
  }

  /// Corrects biases for what rounding weights to nearest does to the means of outputs.
  std::vector<RoundedLayer> correct_biases(const Inputs &data, const RoundingOptions &options = {},
                                           Progress progress = {}) {
    return rounded(hs_model_correct_biases, &data, options, std::move(progress));
  }

  /// Corrects biases without data, by what folded batch norms let expect.
  std::vector<RoundedLayer> correct_biases(const RoundingOptions &options = {},
                                           Progress progress = {}) {
    return rounded(hs_model_correct_biases, nullptr, options, std::move(progress));
  }

  /// Convolutions and matrix products, and the ranges of their weights.
  std::vector<Layer> layers() const {
    detail::Owner<hs_inspection, hs_inspection_free> inspection(
        detail::get<hs_inspection *>(hs_model_inspect, handle_.get()));
    std::vector<Layer> layers;
    auto count = detail::get<std::size_t>(hs_inspection_layer_count, inspection.get());
    for (std::size_t index = 0; index < count; ++index) {
      auto layer = detail::get<hs_layer>(hs_inspection_layer, inspection.get(), index);
      layers.push_back({layer.name,
                        layer.op_type,
                        layer.weight,
                        {layer.channel_minimum, layer.channel_minimum + layer.channel_count},
                        {layer.channel_maximum, layer.channel_maximum + layer.channel_count}});
    }
    return layers;
  }

  hs_model *get() const noexcept { return handle_.get(); }

 private:
  template <typename Function>
  std::vector<RoundedLayer> rounded(Function function, const Inputs *data,
                                    const RoundingOptions &options, Progress progress) {
    detail::RawProgress reporter(std::move(progress));
    // Raw inputs point into these, so no temporary will do.
    const Inputs none;
    detail::RawInputs inputs(data ? *data : none);
    std::vector<const char *> excluded;
    for (const auto &name : options.excluded_layers) excluded.push_back(name.c_str());
    hs_rounding_options raw;
    hs_rounding_options_init(&raw);
    raw.method = options.method;
    raw.parameter_bits = options.parameter_bits;
    raw.activation_bits = options.activation_bits;
    raw.scheme = options.scheme;
    raw.percentile = options.percentile;
    if (!options.configuration.empty()) raw.configuration = options.configuration.c_str();
    raw.excluded_layers = excluded.data();
    raw.excluded_layer_count = excluded.size();
    raw.maximum_rows = options.maximum_rows;
    raw.maximum_bytes = options.maximum_bytes;
    raw.seed = options.seed;
    raw.floor_or_ceil = options.floor_or_ceil;
    raw.iterations = options.iterations;
    if (!options.cache.empty()) raw.cache = options.cache.c_str();
    raw.block_size = options.block_size;
    raw.regularization = options.regularization;
    raw.beta_start = options.beta_start;
    raw.beta_end = options.beta_end;
    raw.warm_start = options.warm_start;
    raw.candidates = options.candidates;
    std::vector<const char *> width_layers;
    std::vector<int32_t> widths;
    for (const auto &entry : options.layer_bits) {
      width_layers.push_back(entry.first.c_str());
      widths.push_back(entry.second);
    }
    raw.width_layers = width_layers.data();
    raw.widths = widths.data();
    raw.width_count = widths.size();
    raw.progress = reporter.function();
    raw.user_data = &reporter;
    detail::Owner<hs_rounding_report, hs_rounding_report_free> report(reporter.call([&] {
      return detail::get<hs_rounding_report *>(
          function, handle_.get(), data ? inputs.names.data() : nullptr,
          data ? inputs.views.data() : nullptr, inputs.names.size(), &raw);
    }));
    std::vector<RoundedLayer> layers;
    auto count = detail::get<std::size_t>(hs_rounding_report_count, report.get());
    for (std::size_t index = 0; index < count; ++index) {
      auto layer = detail::get<hs_rounded_layer>(hs_rounding_report_get, report.get(), index);
      layers.push_back({layer.layer, layer.weight, layer.kept, layer.noise_before,
                        layer.noise_after, layer.bits});
    }
    return layers;
  }

  template <typename Count, typename Item>
  std::vector<ValueInfo> infos(Count count, Item item) {
    std::vector<ValueInfo> result;
    auto total = detail::get<std::size_t>(count, handle_.get());
    for (std::size_t index = 0; index < total; ++index) {
      auto info = detail::get<hs_value_info>(item, handle_.get(), index);
      ValueInfo copy = {info.name, info.dtype, info.rank >= 0, {}};
      if (info.rank > 0) copy.shape.assign(info.shape, info.shape + info.rank);
      result.push_back(std::move(copy));
    }
    return result;
  }

  detail::Owner<hs_model, hs_model_free> handle_;
};

/// How to simulate; the defaults are the library's.
struct SimulationOptions {
  int32_t parameter_bits = 8;
  int32_t activation_bits = 8;
  hs_range_scheme scheme = HS_RANGE_SCHEME_MIN_MAX;
  double percentile = 100;
  std::string configuration;  ///< Name or path; empty for "default_per_channel".
  int32_t block_size = 0;  ///< Input channels that share a scale of a weight; 0: all of a channel.
};

/// What did not match when encodings were loaded.
struct LoadReport {
  std::vector<std::string> unknown;
  std::vector<std::string> missing;
  std::vector<std::string> different;
};

/// How to compress.
struct CompressionOptions {
  hs_compression_scheme scheme = HS_COMPRESSION_SPATIAL_SVD;
  hs_compression_metric metric = HS_METRIC_MACS;
  int64_t multiplicity = 1;
  std::vector<std::string> ignored_layers;
  /// Which channels go first in channel pruning.
  hs_channel_importance importance = HS_CHANNELS_BY_RECONSTRUCTION;
  /// Whether channel pruning fits layers to the channels that are left.
  bool reconstructs = true;
  /// Layers that keep all channels that they read, for channel pruning.
  std::vector<std::string> input_keepers;
  /// Whether channel pruning keeps channels that Split, Slice and Gather pick by position.
  bool keeps_positions = false;
};

/// A constant that lost channels along an axis.
struct PrunedConstant {
  std::string name;           ///< Name before.
  std::string result;         ///< Name in the compressed model.
  int64_t axis;               ///< Axis of the channels.
  std::vector<int64_t> kept;  ///< Indices that stay, rising.
};

/// A compressed model and its costs before and after.
struct Compressed {
  Model model;
  int64_t macs_before;
  int64_t macs_after;
  int64_t parameters_before;
  int64_t parameters_after;
  std::vector<PrunedConstant> constants;  ///< What lost channels; an entry for each axis.
};

/// Compresses a model, as often as wanted. Sizes are ranks or numbers of channels, 0 for layers
/// that stay.
class Compressor {
 public:
  explicit Compressor(const Model &model, const CompressionOptions &options = {}) {
    std::vector<const char *> ignored;
    for (const auto &name : options.ignored_layers) ignored.push_back(name.c_str());
    std::vector<const char *> keepers;
    for (const auto &name : options.input_keepers) keepers.push_back(name.c_str());
    hs_compression_options raw;
    hs_compression_options_init(&raw);
    raw.input_keepers = keepers.data();
    raw.input_keeper_count = keepers.size();
    raw.keeps_positions = options.keeps_positions ? 1 : 0;
    raw.scheme = options.scheme;
    raw.metric = options.metric;
    raw.multiplicity = options.multiplicity;
    raw.importance = options.importance;
    raw.without_reconstruction = options.reconstructs ? 0 : 1;
    raw.ignored_layers = ignored.data();
    raw.ignored_layer_count = ignored.size();
    handle_.reset(detail::get<hs_compressor *>(hs_compressor_create,
                                               static_cast<const hs_model *>(model.get()), &raw));
  }

  /// Names of the layers that can be split or pruned, in the order of their sizes.
  std::vector<std::string> layers() const {
    std::vector<std::string> names;
    auto count = detail::get<std::size_t>(hs_compressor_layer_count, handle_.get());
    for (std::size_t index = 0; index < count; ++index) {
      names.emplace_back(
          detail::get<hs_compressible_layer>(hs_compressor_layer, handle_.get(), index).name);
    }
    return names;
  }

  /// Positions in `layers` of what a layer reads, by its name; where layers are split, of itself.
  std::vector<std::size_t> read_by(const std::string &name) const {
    return positions([&](std::size_t *out, std::size_t capacity, std::size_t *count) {
      detail::call(hs_compressor_find_read, handle_.get(), name.c_str(), out, capacity, count);
    });
  }

  /// Names of layers that write or read the channels of one of `layers`.
  std::vector<std::string> members(std::size_t layer, hs_channel_role role) const {
    std::vector<std::string> names;
    auto found = positions([&](std::size_t *out, std::size_t capacity, std::size_t *count) {
      detail::call(hs_compressor_members, handle_.get(), layer, role, out, capacity, count);
    });
    for (std::size_t index : found) {
      names.emplace_back(detail::get<hs_layer_cost>(hs_compressor_cost, handle_.get(), index).name);
    }
    return names;
  }

  /// The rank or number of channels that a ratio means for a layer; 0 for ratios of 1 and more.
  int64_t units(std::size_t layer, double ratio) const {
    return detail::get<int64_t>(hs_compressor_units, handle_.get(), layer, ratio);
  }

  /// The ratio that a size of a layer amounts to.
  double ratio(std::size_t layer, int64_t units) const {
    return detail::get<double>(hs_compressor_ratio, handle_.get(), layer, units);
  }

  /// Takes unlabeled inputs, copied: from now on layers are split for them, and sizes chosen by
  /// what they do to the layers' outputs.
  void calibrate(const Inputs &data) {
    detail::RawInputs inputs(data);
    detail::call(hs_compressor_calibrate, handle_.get(), inputs.names.data(), inputs.views.data(),
                 inputs.names.size());
  }

  /// The share of a layer that each size from 0 on loses when nothing else is compressed. The first
  /// call works for all layers.
  std::vector<double> errors(std::size_t layer, Progress progress = {}) const {
    detail::RawProgress reporter(std::move(progress));
    std::size_t count = 0;
    reporter.call([&] {
      detail::call(hs_compressor_errors, handle_.get(), layer, reporter.function(),
                   static_cast<void *>(&reporter), nullptr, std::size_t(0), &count);
    });
    std::vector<double> errors(count);
    errors.reserve(1);
    detail::call(hs_compressor_errors, handle_.get(), layer, nullptr, nullptr, errors.data(),
                 errors.size(), &count);
    return errors;
  }

  /// Chooses sizes without evaluating the network.
  std::vector<int64_t> select(double target, Progress progress = {}) const {
    std::vector<int64_t> sizes(detail::get<std::size_t>(hs_compressor_layer_count, handle_.get()));
    // A vector without elements may have no address.
    sizes.reserve(1);
    detail::RawProgress reporter(std::move(progress));
    reporter.call([&] {
      detail::call(hs_compressor_select, handle_.get(), target, reporter.function(),
                   static_cast<void *>(&reporter), sizes.data(), sizes.size());
    });
    return sizes;
  }

  /// Compresses with a size for each layer.
  Compressed compress(const std::vector<int64_t> &sizes, Progress progress = {}) const {
    std::vector<int64_t> copy = sizes;
    copy.reserve(1);
    detail::RawProgress reporter(std::move(progress));
    hs_model *model = nullptr;
    hs_compression_report *report = nullptr;
    reporter.call([&] {
      detail::call(hs_compressor_compress, handle_.get(), copy.data(), copy.size(),
                   reporter.function(), static_cast<void *>(&reporter), &model, &report);
    });
    detail::Owner<hs_compression_report, hs_compression_report_free> owner(report);
    Model result(model);
    auto total = detail::get<hs_compressed_layer>(hs_compression_report_total, report);
    std::vector<PrunedConstant> constants;
    auto count = detail::get<std::size_t>(hs_compression_report_constant_count, report);
    for (std::size_t index = 0; index < count; ++index) {
      auto item = detail::get<hs_pruned_constant>(hs_compression_report_constant, report, index);
      constants.push_back({item.name, item.result, item.axis,
                           std::vector<int64_t>(item.kept, item.kept + item.kept_count)});
    }
    return {std::move(result),       total.macs_before,      total.macs_after,
            total.parameters_before, total.parameters_after, std::move(constants)};
  }

 private:
  /// What a function gives that first counts and then fills a buffer.
  template <typename Call>
  static std::vector<std::size_t> positions(Call call) {
    std::size_t count = 0;
    call(nullptr, std::size_t(0), &count);
    std::vector<std::size_t> found(count);
    found.reserve(1);
    call(found.data(), found.size(), &count);
    return found;
  }

  detail::Owner<hs_compressor, hs_compressor_free> handle_;
};

/// A network simulated on integer hardware.
class Simulation {
 public:
  /// Places quantizers in a network and chooses the grids of its constants.
  explicit Simulation(const Model &model, const SimulationOptions &options = {}) {
    hs_simulation_options raw;
    hs_simulation_options_init(&raw);
    raw.parameter_bits = options.parameter_bits;
    raw.activation_bits = options.activation_bits;
    raw.scheme = options.scheme;
    raw.percentile = options.percentile;
    if (!options.configuration.empty()) raw.configuration = options.configuration.c_str();
    raw.block_size = options.block_size;
    handle_.reset(detail::get<hs_simulation *>(hs_simulation_create, model.get(), &raw));
  }

  /// Observes data batch by batch along the first dimension and chooses the grids.
  void calibrate(const Inputs &inputs, std::size_t batch_size = 0, Progress progress = {}) {
    detail::RawProgress reporter(std::move(progress));
    hs_calibration_options options;
    hs_calibration_options_init(&options);
    options.batch_size = batch_size;
    options.progress = reporter.function();
    options.user_data = &reporter;
    detail::RawInputs raw(inputs);
    reporter.call([&] {
      detail::call(hs_simulation_calibrate, handle_.get(), raw.names.data(), raw.views.data(),
                   raw.names.size(), &options);
    });
  }

  /// Observes one batch; follow with compute_encodings().
  void observe(const Inputs &inputs) {
    detail::RawInputs raw(inputs);
    detail::call(hs_simulation_observe, handle_.get(), raw.names.data(), raw.views.data(),
                 raw.names.size());
  }

  /// Remembers what a computed tensor held in a run that was made elsewhere.
  void observe(const std::string &tensor, const TensorView &value) {
    hs_tensor_view view = value.raw();
    detail::call(hs_simulation_observe_value, handle_.get(), tensor.c_str(), &view);
  }

  void reset_statistics() { detail::call(hs_simulation_reset_statistics, handle_.get()); }
  void compute_encodings() { detail::call(hs_simulation_compute_encodings, handle_.get()); }

  /// Everything observed so far, to be merged elsewhere.
  std::vector<unsigned char> serialize_statistics() {
    std::vector<unsigned char> bytes(
        detail::get<std::size_t>(hs_simulation_statistics_size, handle_.get()) + 1);
    auto size = detail::get<std::size_t>(hs_simulation_serialize_statistics, handle_.get(),
                                         static_cast<void *>(bytes.data()), bytes.size());
    bytes.resize(size);
    return bytes;
  }

  void merge_statistics(const std::vector<unsigned char> &bytes) {
    static const unsigned char none = 0;
    const void *data = bytes.empty() ? &none : bytes.data();
    detail::call(hs_simulation_merge_statistics, handle_.get(), data, bytes.size());
  }

  /// Runs the simulated network.
  Tensors run(const Inputs &inputs, const std::vector<std::string> &extra_outputs = {}) {
    detail::RawInputs raw(inputs);
    detail::RawRunOptions options(extra_outputs);
    return Tensors(detail::get<hs_tensors *>(hs_simulation_run, handle_.get(), raw.names.data(),
                                             raw.views.data(), raw.names.size(), &options.options));
  }

  /// The encodings as AIMET's JSON.
  std::string encodings(const std::string &version = "1.0.0") {
    std::string json(
        detail::get<std::size_t>(hs_simulation_encodings_size, handle_.get(), version.c_str()),
        '\0');
    detail::get<std::size_t>(hs_simulation_encodings_json, handle_.get(), version.c_str(),
                             static_cast<void *>(json.data()), json.size());
    return json;
  }

  /// Writes `<prefix>.onnx` and `<prefix>.encodings` to a folder.
  void export_to(const std::string &directory, const std::string &prefix,
                 const std::string &version = "1.0.0") {
    detail::call(hs_simulation_export, handle_.get(), directory.c_str(), prefix.c_str(),
                 version.c_str());
  }

  /// Writes a model with QuantizeLinear and DequantizeLinear.
  void export_qdq(const std::string &path, bool prequantizes_constants = false,
                  bool exports_int32_bias = false) {
    hs_qdq_options options;
    hs_qdq_options_init(&options);
    options.prequantizes_constants = prequantizes_constants;
    options.exports_int32_bias = exports_int32_bias;
    detail::call(hs_simulation_export_qdq, handle_.get(), path.c_str(), &options);
  }

  /// Takes encodings from JSON; strict throws on any mismatch.
  LoadReport load_encodings(const std::string &json, bool strict = true) {
    detail::Owner<hs_load_report, hs_load_report_free> report(detail::get<hs_load_report *>(
        hs_simulation_load_encodings, handle_.get(), static_cast<const void *>(json.data()),
        json.size(), static_cast<int32_t>(strict)));
    auto texts = [&](hs_load_mismatch kind) {
      std::vector<std::string> result;
      auto count = detail::get<std::size_t>(hs_load_report_count, report.get(), kind);
      for (std::size_t index = 0; index < count; ++index) {
        result.push_back(detail::get<const char *>(hs_load_report_get, report.get(), kind, index));
      }
      return result;
    };
    return {texts(HS_LOAD_MISMATCH_UNKNOWN), texts(HS_LOAD_MISMATCH_MISSING),
            texts(HS_LOAD_MISMATCH_DIFFERENT)};
  }

  hs_simulation *get() const noexcept { return handle_.get(); }

 private:
  detail::Owner<hs_simulation, hs_simulation_free> handle_;
};

}  // namespace halfstep

#endif
