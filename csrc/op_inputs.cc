#include "op_inputs.h"

namespace cpmbee {
namespace {

constexpr int64_t kBlock = 1 << 16;  // elements that one thread checks at a time
constexpr int64_t kMostHeads = 1 << 16;  // an empty table may name any number, and memory is taken for each

// Is every element in [low, high]? gcc vectorizes this, but not with std::min and std::max, which return references.
template <class T>
bool all_in_range(const T* values, int64_t count, int64_t low, int64_t high) {
  if (count == 0) return true;
  T smallest = values[0];
  T largest = values[0];
  for (int64_t i = 0; i < count; ++i) {
    const T value = values[i];
    smallest = value < smallest ? value : smallest;
    largest = value > largest ? value : largest;
  }
  return smallest >= low && largest <= high;
}

[[noreturn]] void report(const char* op, const char* input, const std::vector<int64_t>& dims, int64_t index,
                         int64_t value, int64_t low, int64_t high) {
  std::string position;
  for (size_t axis = dims.size(); axis-- > 0;) {
    position = std::to_string(index % dims[axis]) + (position.empty() ? "" : ",") + position;
    index /= dims[axis];
  }
  throw InvalidInput(std::string(op) + ": " + input + "[" + position + "] is " + std::to_string(value) +
                     ", must be in " + std::to_string(low) + ".." + std::to_string(high));
}

template <class T>
void require_values(const char* op, const char* input, const Tensor& tensor, int64_t low, int64_t high,
                    const Executor& executor) {
  const T* values = tensor.as<T>();
  const int64_t count = tensor.count();
  std::atomic<bool> good{true};
  executor.for_each((count + kBlock - 1) / kBlock, [&](size_t block) {
    const int64_t begin = block * kBlock;
    if (!all_in_range(values + begin, std::min(kBlock, count - begin), low, high)) good = false;
  });
  if (good) return;
  const T* bad = std::find_if(values, values + count, [&](T value) { return value < low || value > high; });
  report(op, input, tensor.dims, bad - values, *bad, low, high);
}

BiasTable rearranged(const char* op, const Tensor& table, float unit) {
  require_shape(op, "table", table, {-1, -1}, "[N,H]");
  if (table.dims[1] > kMostHeads) {
    throw InvalidInput(std::string(op) + ": table " + table.shape() + " has more than " + std::to_string(kMostHeads) +
                       " heads");
  }
  return BiasTable(table.as<float>(), table.dims[0], table.dims[1], unit);
}

}  // namespace

void require_shape(const char* op, const char* input, const Tensor& tensor, const std::vector<int64_t>& sizes,
                   const char* expected) {
  bool good = tensor.dims.size() == sizes.size();
  for (size_t i = 0; good && i < sizes.size(); ++i) good = sizes[i] == -1 || sizes[i] == tensor.dims[i];
  if (good) return;
  std::string text = std::string(op) + ": " + input + " must have the shape " + expected + " = [";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? "," : "") + (sizes[i] == -1 ? "?" : std::to_string(sizes[i]));
  throw InvalidInput(text + "], not " + tensor.shape());
}

void require_in_range(const char* op, const char* input, const Tensor& tensor, int64_t low, int64_t high,
                      const Executor& executor) {
  if (tensor.element_type == ort::kInt16) return require_values<int16_t>(op, input, tensor, low, high, executor);
  require_values<int32_t>(op, input, tensor, low, high, executor);
}

TableInput::TableInput(const char* op, const NodeInfo& info, size_t index, float unit)
    : op_(op), index_(index), unit_(unit) {
  const std::unique_ptr<Tensor> table = info.constant_input(index);
  if (table != nullptr) constant_.emplace(rearranged(op_, *table, unit));
}

const BiasTable& TableInput::get(const Context& context, BiasTable& storage) const {
  if (constant_) return *constant_;
  storage = rearranged(op_, context.input(index_), unit_);
  return storage;
}

}  // namespace cpmbee
