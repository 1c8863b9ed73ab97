#include "onnx_chain.h"

#include <algorithm>

#include "checks.h"
#include "memory.h"

namespace spp {
namespace {

constexpr size_t kMostShapes = 32;  // for which something stays prepared

ChainPointer make_chain(const std::vector<const Plan*>& plans, const std::vector<KernelConfig>& configs) {
  std::vector<const KernelConfig*> pointers;
  for (const KernelConfig& config : configs) pointers.push_back(&config);
  CheckedChain* made = nullptr;
  require(spp_chain_create(plans.data(), pointers.data(), static_cast<int32_t>(plans.size()), &made));
  return ChainPointer(made);
}

}  // namespace

ColumnChain::ColumnChain(const ChainAttributes& attributes, const std::vector<Parameter>& parameters,
                         int32_t threads)
    : adds_residual_(attributes.residual), threads_(threads) {
  add_layers(attributes);
  const size_t expected = 3 * layers_.size() + (attributes.linear ? 2 : 0);
  check(parameters.size() == expected, [&] {
    return std::to_string(layers_.size()) + " layers" + (attributes.linear ? " and a linear one" : "") + " need " +
           std::to_string(expected) + " constant inputs, got " + std::to_string(parameters.size()) + ".";
  });
  make_plans(attributes, parameters);
  if (attributes.linear) add_linear(parameters[expected - 2], parameters[expected - 1]);
  add_rows(attributes.configs);
}

void ColumnChain::add_layers(const ChainAttributes& attributes) {
  const size_t count = attributes.geometry.size() / kGeometryNumbers;
  check(count > 0, "The attribute `geometry` must describe a layer, by 11 numbers.");
  check_length("geometry", attributes.geometry.size(), count * kGeometryNumbers);
  check_length("activation", attributes.activation.size(), count);
  check_length("clamp", attributes.clamp.size(), 2 * count);
  check_length("post", attributes.post.size(), attributes.alpha.size() * kPostNumbers);
  for (size_t i = 0; i < count; ++i) {
    layers_.push_back({geometry_of(&attributes.geometry[i * kGeometryNumbers]), {}, nullptr});
    check(i == 0 || layers_[i].geometry.channels == layers_[i - 1].geometry.filters,
          "A layer must read as many channels as the one before it has filters.");
  }
  for (size_t i = 0; i < attributes.alpha.size(); ++i) {
    const int64_t* numbers = &attributes.post[i * kPostNumbers];
    Layer& layer = layers_[number("post", numbers[0], static_cast<int64_t>(count) - 1)];
    layer.post.push_back(epilogue_op(numbers + 1, attributes.alpha[i]));
  }
}

void ColumnChain::make_plans(const ChainAttributes& attributes, const std::vector<Parameter>& parameters) {
  for (size_t i = 0; i < layers_.size(); ++i) {
    Layer& layer = layers_[i];
    const Parameter *weight = &parameters[3 * i], *columns = weight + 1, *bias = weight + 2;
    const std::string of = " of layer " + std::to_string(i);
    check_parameter("The weight" + of, *weight, Dtype::kFloat32, 2);
    check_parameter("The columns" + of, *columns, Dtype::kInt32, 1);
    check_parameter("The bias" + of, *bias, Dtype::kFloat32, 1);
    check(layer.geometry.groups > 0, "A convolution has at least one group.");
    check_shape("The weight" + of, weight->shape,
                {layer.geometry.filters / layer.geometry.groups, columns->shape[0]});
    check(columns->shape[0] <= kMostNumbers, "There are too many columns.");
    Plan* plan = nullptr;
    require(spp_plan_create(
        &layer.geometry, columns->as<int32_t>(), static_cast<int32_t>(columns->shape[0]),
        weight->as<float>(), weight->shape[0] * weight->shape[1],
        bias->as<float>(), bias->shape[0], attributes.clamp[2 * i], attributes.clamp[2 * i + 1],
        static_cast<Activation>(number("activation", attributes.activation[i], kMostSize)), layer.post.data(),
        static_cast<int32_t>(layer.post.size()), 0, &plan));
    layer.plan.reset(plan);
  }
}

void ColumnChain::add_linear(const Parameter& weight, const Parameter& bias) {
  check_parameter("The linear layer's weight", weight, Dtype::kFloat32, 2);
  check_parameter("The linear layer's bias", bias, Dtype::kFloat32, 1);
  const int64_t out = weight.shape[0], in = weight.shape[1];
  check(out <= kMostNumbers && in <= kMostNumbers, "The linear layer is too large.");
  check_shape("The linear layer's bias", bias.shape, {out});
  linear_ = Linear{weight.as<float>(), in * out, bias.as<float>(), out,
                   static_cast<int32_t>(in), static_cast<int32_t>(out)};
}

void ColumnChain::add_rows(const Shape& configs) {
  const size_t width = 3 + 2 * layers_.size();
  check_length("configs", configs.size(), configs.size() / width * width);
  for (size_t at = 0; at < configs.size(); at += width) {
    const int64_t* n = &configs[at];
    Row row{n[0], number("configs", n[1], kMostThreads), number("configs", n[2], kMostThreads), {}};
    check(row.batch >= 0 && row.threads > 0, "The attribute `configs` must hold positive batches and threads.");
    for (size_t i = 0; i < layers_.size(); ++i) {
      const int32_t kernel = number("configs", n[3 + 2 * i], kMostSize);
      row.layers.emplace_back(static_cast<Kernel>(kernel), number("configs", n[4 + 2 * i], kMostThreads));
    }
    rows_.push_back(std::move(row));
  }
}

// The row of the largest batch, and of it of the most threads, that are not more than there are. Whoever uses all
// threads of the row uses all that there are. Without such a row, one layer is called after the other.
ColumnChain::Row ColumnChain::row_for(int64_t batch) const {
  const Row* best = nullptr;
  for (const Row& row : rows_)
    if (row.batch <= batch && row.threads <= threads_ &&
        (best == nullptr || std::pair(row.batch, row.threads) > std::pair(best->batch, best->threads)))
      best = &row;
  if (best == nullptr)
    return {batch, threads_, 0, {layers_.size(), std::pair(Kernel::kPixelVectorised, threads_)}};
  const auto scaled = [&](int32_t threads) {
    return threads == best->threads ? threads_ : std::min(threads, threads_);
  };
  Row row = *best;
  row.at_once = scaled(row.at_once);
  for (auto& layer : row.layers) layer.second = std::max(1, scaled(layer.second));
  return row;
}

std::shared_ptr<const PreparedShape> ColumnChain::prepared(const Shape& shape) const {
  const std::lock_guard lock(mutex_);
  const auto found =
      std::find_if(shapes_.begin(), shapes_.end(), [&](const auto& entry) { return entry.first == shape; });
  if (found != shapes_.end()) {
    shapes_.splice(shapes_.begin(), shapes_, found);
  } else {
    shapes_.emplace_front(shape, prepare(shape));
    if (shapes_.size() > kMostShapes) shapes_.pop_back();
  }
  return shapes_.front().second;
}

std::shared_ptr<const PreparedShape> ColumnChain::prepare(const Shape& shape) const {
  auto made = std::make_shared<PreparedShape>();
  Shape own = shape;  // of the layer's input
  const Row row = row_for(shape.empty() ? 0 : shape[0]);
  std::vector<const Plan*> plans;
  for (size_t i = 0; i < layers_.size(); ++i) {
    const auto [kernel, threads] = row.layers[i];
    KernelConfig config = conv_config(layers_[i].geometry, own, row.at_once ? row.at_once : threads);
    config.kernel = row.at_once ? Kernel::kChannelBlocked : kernel;
    made->configs.push_back(config);
    made->counts.push_back(own[0] * own[1] * own[2] * own[3]);
    made->residual = {own[0], layers_[i].geometry.filters, config.conv_height, config.conv_width};
    int height = config.conv_height, width = config.conv_width;
    for (const EpilogueOp& op : layers_[i].post) size_after(op, height, width);
    check(height > 0 && width > 0, "An image is smaller than a pool's window.");
    own = {own[0], layers_[i].geometry.filters, height, width};
    plans.push_back(layers_[i].plan.get());
    const bool is_blocked = !row.at_once && kernel == Kernel::kChannelBlocked;
    made->alone.push_back(is_blocked ? make_chain({plans.back()}, {config}) : nullptr);
  }
  made->counts.push_back(own[0] * own[1] * own[2] * own[3]);
  made->output = own;
  if (linear_) {
    const int64_t features = own[1] * own[2] * own[3];
    check(features == linear_->in_features, [&] {
      return "The linear layer reads " + std::to_string(linear_->in_features) + " features, but there are " +
             std::to_string(features) + ".";
    });
    made->output = {shape[0], linear_->out_features};
  }
  if (row.at_once) made->at_once = make_chain(plans, made->configs);
  return made;
}

void ColumnChain::run(const PreparedShape& prepared, const float* x, const float* residual, float* output) const {
  const Linear* linear = linear_ ? &*linear_ : nullptr;
  const int64_t batch = prepared.output[0];
  const int64_t added = prepared.residual[0] * prepared.residual[1] * prepared.residual[2] * prepared.residual[3];
  const int64_t out_count = linear ? batch * linear->out_features : prepared.counts.back();
  if (prepared.at_once)
    return require(spp_chain_forward(prepared.at_once.get(), x, prepared.counts.front(), residual,
                                     residual ? added : 0, linear, output, out_count));
  thread_local Buffer between[2];
  for (size_t i = 0; i < layers_.size(); ++i) {
    const bool is_last = i + 1 == layers_.size();
    const int64_t count = prepared.counts[i + 1];
    float* y = is_last && !linear ? output : between[i % 2].get<float>(count);
    const float* adds = is_last ? residual : nullptr;
    const CheckedChain* alone = prepared.alone[i].get();
    require(alone ? spp_chain_forward(alone, x, prepared.counts[i], adds, adds ? added : 0, nullptr, y, count)
                  : spp_forward(layers_[i].plan.get(), &prepared.configs[i], x, prepared.counts[i], adds,
                                adds ? added : 0, y, count));
    x = y;
  }
  if (linear)
    require(spp_linear(linear, x, prepared.counts.back(), batch, threads_, output, out_count));
}

}  // namespace spp
