#include "checks.h"

#include <limits>

namespace spp {
namespace {

constexpr int64_t kMostNumbers = std::numeric_limits<int32_t>::max();  // of an image

std::string text(int64_t number) { return std::to_string(number); }

// Reach of a kernel: pixels from its first tap to its last one.
int64_t reach(const Geometry& g, int d) { return int64_t{g.kernel[d] - 1} * g.dilation[d] + 1; }

}  // namespace

void check_count(const char* name, Span tensor, int64_t count, bool optional) {
  if (optional && tensor.data == nullptr && tensor.count == 0) return;
  check(tensor.count == count, [&] {
    return std::string("`") + name + "` must have " + text(count) + " numbers, got " + text(tensor.count) + ".";
  });
  check(tensor.data != nullptr || count == 0, [&] { return std::string("`") + name + "` must not be null."; });
}

void check_geometry(const Geometry& g, const int32_t* columns, int32_t num_columns) {
  check(g.channels > 0 && g.filters > 0 && g.groups > 0, "Channels, filters and groups must be positive.");
  check(g.channels % g.groups == 0 && g.filters % g.groups == 0,
        [&] { return "`groups` (=" + text(g.groups) + ") must divide channels and filters."; });
  for (int d = 0; d < 2; ++d) {
    check(g.kernel[d] > 0 && g.stride[d] > 0 && g.dilation[d] > 0 && g.padding[d] >= 0,
          "Kernel, stride and dilation must be positive, and padding at least 0.");
    check(reach(g, d) <= kMostNumbers, "The kernel reaches too far.");
  }
  const int64_t all = int64_t{g.channels} * g.kernel[0] * g.kernel[1];
  check(num_columns >= 0 && num_columns <= all && all <= kMostNumbers,
        [&] { return "There must be 0 to " + text(all) + " columns, got " + text(num_columns) + "."; });
  check(columns != nullptr || num_columns == 0, "`columns` must not be null.");
  for (int32_t k = 0; k < num_columns; ++k)
    check(columns[k] >= 0 && columns[k] < all && (k == 0 || columns[k] > columns[k - 1]),
          [&] { return "`columns` must be ascending and in [0, " + text(all) + "), got " + text(columns[k]) + "."; });
}

void check_clamp(float low, float high, Activation activation) {
  const auto number = static_cast<int32_t>(activation);
  check(number >= 0 && number < kActivations, [&] { return "There is no activation " + text(number) + "."; });
  const bool clamps = low > -std::numeric_limits<float>::infinity() || high < std::numeric_limits<float>::infinity();
  check(!clamps || activation == Activation::kNone, "A layer has a clamp or an activation, not both.");
}

void check_epilogue(const EpilogueOp* ops, int32_t count) {
  check(count >= 0 && (ops != nullptr || count == 0), "`epilogue` must not be null.");
  for (int32_t i = 0; i < count; ++i) {
    const EpilogueOp& op = ops[i];
    const bool is_norm = op.kind == EpilogueKind::kLocalResponseNorm;
    check(is_norm || op.kind == EpilogueKind::kMaxPool || op.kind == EpilogueKind::kAveragePool,
          [&] { return "There is no epilogue operation " + text(static_cast<int32_t>(op.kind)) + "."; });
    for (int d = 0; d < 2; ++d)
      check(op.kernel[d] > 0 && op.stride[d] > 0 && op.padding[d] >= 0 &&
                (is_norm || op.padding[d] <= op.kernel[d] / 2),
            "A pool's windows and strides must be positive, and its padding at most half a window.");
    check(!is_norm || (op.kernel[0] == op.kernel[1] && op.kernel[0] % 2 == 1),
          "The windows of a local response norm must be square and odd.");
  }
}

PoolSize check_pool(const EpilogueOp& op, int64_t planes, int32_t height, int32_t width, int32_t threads) {
  constexpr int32_t kMostWindow = 1 << 24;
  check_epilogue(&op, 1);
  check(op.kind != EpilogueKind::kLocalResponseNorm, "The operation must be a pool.");
  check(planes >= 0 && planes < int64_t{1} << 40 && height > 0 && width > 0 && threads > 0,
        "Height, width and threads must be positive, and the planes at least 0.");
  check(int64_t{height} * width < int64_t{1} << 31, "A plane must have fewer than 2^31 numbers.");
  const auto size = [&](int axis, int32_t length) {
    check(op.kernel[axis] <= kMostWindow && op.stride[axis] <= kMostWindow && length <= kMostWindow,
          "Planes, windows and strides must be at most 2^24 wide and high.");
    return pool_size(length, op.kernel[axis], op.stride[axis], op.padding[axis], op.ceil_mode);
  };
  const PoolSize out{size(0, height), size(1, width)};
  check(out.height > 0 && out.width > 0, "The planes must be at least as large as a window.");
  return out;
}

void check_sizes(const Geometry& g, const KernelConfig& config) {
  check(config.batch >= 0 && config.height > 0 && config.width > 0 && config.threads > 0,
        "Height, width and threads must be positive, and the batch at least 0.");
  const int32_t size[2] = {config.height, config.width}, out[2] = {config.conv_height, config.conv_width};
  for (int d = 0; d < 2; ++d) {
    const int64_t room = int64_t{size[d]} + 2 * int64_t{g.padding[d]} - reach(g, d);
    check(room >= 0 && out[d] == room / g.stride[d] + 1, [&] {
      return "The convolution makes " + text(room < 0 ? 0 : room / g.stride[d] + 1) + " of " + text(size[d]) +
             " pixels along axis " + text(d) + ", not " + text(out[d]) + ".";
    });
  }
  check(int64_t{g.channels} * config.height * config.width <= kMostNumbers &&
            int64_t{g.filters} * config.conv_height * config.conv_width <= kMostNumbers,
        "An image must have fewer than 2³¹ numbers; split it.");
}

void check_config(const Plan& plan, const KernelConfig& config) {
  const Geometry& g = plan.geometry;
  check_sizes(g, config);
  int height = config.conv_height, width = config.conv_width;
  for (const EpilogueOp& op : plan.epilogue) {
    size_after(op, height, width);
    check(height > 0 && width > 0, "An image is smaller than a pool's window.");
  }
  check(config.bfloat16 == 0 || config.bfloat16 == 1, "`bfloat16` must be 0 or 1.");
  const bool is_plain = g.kernel[0] == 3 && g.kernel[1] == 3 && g.stride[0] == 1 && g.stride[1] == 1 &&
                        g.dilation[0] == 1 && g.dilation[1] == 1 && g.groups == 1;
  switch (config.kernel) {
    case Kernel::kPixelVectorised: return;
    case Kernel::kChannelBlocked:
      return check(!config.bfloat16 || !plan.is_depthwise(),
                   "The channel-blocked kernel computes depthwise layers in float32.");
    case Kernel::kBfloat16Pairs:
      return check(config.bfloat16 && plan.pairs.floats, "Pairs need an input and weights of bfloat16.");
    case Kernel::kWinograd4:
    case Kernel::kWinograd2:
      return check(is_plain && !config.bfloat16,
                   "Winograd's kernels compute 3×3 layers of float32, with strides and dilations of 1 and one"
                   " group.");
  }
  throw BadArgument("There is no kernel " + text(static_cast<int32_t>(config.kernel)) + ".");
}

int64_t input_count(const KeptColumns& layer, const KernelConfig& config) {
  return config.batch * layer.geometry.channels * config.height * config.width;
}

int64_t conv_count(const KeptColumns& layer, const KernelConfig& config) {
  return config.batch * layer.geometry.filters * config.conv_height * config.conv_width;
}

int64_t output_count(const Plan& plan, const KernelConfig& config) {
  int height = config.conv_height, width = config.conv_width;
  for (const EpilogueOp& op : plan.epilogue) size_after(op, height, width);
  return config.batch * plan.geometry.filters * height * width;
}

void check_linear(const Linear& linear) {
  check(linear.in_features >= 0 && linear.out_features >= 0, "Features must be at least 0.");
  check_count("weight", {linear.weight, linear.weight_count},
              int64_t{linear.in_features} * linear.out_features);
  check_count("bias", {linear.bias, linear.bias_count}, linear.out_features, true);
}

namespace {

void check_gate_layer(const GateLayer& layer, int32_t channels) {
  check(layer.num_columns >= 0 && layer.filters > 0, "A gate's layers must have filters.");
  check_count("weight", {layer.weight, layer.weight_count}, int64_t{layer.num_columns} * layer.filters);
  check(layer.columns != nullptr || layer.num_columns == 0, "`columns` must not be null.");
  for (int32_t k = 0; k < layer.num_columns; ++k)
    check(layer.columns[k] >= 0 && layer.columns[k] < channels, "`columns` must be channels of the input.");
  check_clamp(layer.low, layer.high, layer.activation);
}

}  // namespace

void check_gate(const Gate& gate) {
  check(gate.channels > 0, "Channels must be positive.");
  check_gate_layer(gate.reduce, gate.channels);
  check_gate_layer(gate.expand, gate.reduce.filters);
  check(gate.expand.filters == gate.channels, "A gate must have a factor for each channel.");
}

int64_t check_parts(const ConcatPart* parts, int32_t count, int64_t pixels) {
  check(count > 0 && parts != nullptr, "There must be parts.");
  int64_t channels = 0;
  for (int32_t i = 0; i < count; ++i) {
    check(parts[i].channels > 0, "A part must have channels.");
    check_count("x", {parts[i].data, parts[i].count}, parts[i].channels * pixels);
    channels += parts[i].channels;
  }
  return channels;
}

void check_norm(const Norm& norm, const ConcatPart* parts, int32_t count, int64_t pixels) {
  check(norm.channels > 0, "There must be channels.");
  check(norm.mean != nullptr && norm.variance != nullptr, "`mean` and `variance` must not be null.");
  check(check_parts(parts, count, pixels) == norm.channels, "The parts must have as many channels as the norm.");
}

}  // namespace spp
