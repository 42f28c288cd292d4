// The experts of a Mixture-of-Experts layer.
#include "primitives/fast_ops.h"
#include "primitives/primitives.h"

namespace cenacle {
namespace {

// Which row each id is, or -1: another rank's.
std::vector<int32_t> rows_of(const uint32_t* id, int64_t n, const int32_t* map, int64_t known,
                             const ReplicaAssigner* assigner) {
  std::vector<int32_t> rows(n);
  for (int64_t i = 0; i < n; i++) {
    if (id[i] >= uint64_t(known))
      throw std::runtime_error("expert id " + std::to_string(id[i]) + " of " + std::to_string(known));
    rows[i] = map[id[i]];
  }
  if (assigner) {  // replicas of what we hold may be computed elsewhere
    std::vector<int64_t> counts(assigner->holders.size(), 0);
    for (int64_t i = 0; i < n; i++)
      if (id[i] < counts.size()) counts[id[i]]++;
    const std::vector<int> assigned = assigner->assign(counts);
    for (int64_t i = 0; i < n; i++)
      if (rows[i] >= 0 && assigned[id[i]] != assigner->rank) rows[i] = -1;
  }
  return rows;
}

class ExpertsPrimitive : public Primitive {
 public:
  ExpertsPrimitive(mx::Stream s, Experts experts, const Kernels* kernels,
                   std::shared_ptr<const ReplicaAssigner> assigner, bool summed)
      : Primitive(s), experts_(std::move(experts)), kernels_(kernels), assigner_(std::move(assigner)),
        summed_(summed) {}
  const char* name() const override { return summed_ ? "CenacleExpertsSum" : "CenacleExperts"; }

  // Inputs: x, ids, which row each id is, the ids' weights if they are summed, matrices.
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    float* out = begin(inputs, outputs[0]);
    const int64_t k = inputs[1].shape(-1), tokens = k ? inputs[1].size() / k : 0;
    enqueue(
        stream(), outputs[0].nbytes(),
        [x = StridedInput(inputs[0]), ids = StridedInput(inputs[1]), map = inputs[2].data<int32_t>(),
         known = int64_t(inputs[2].size()), out, tokens, k, e = experts_,
         kernels = kernels_, assigner = assigner_,
         weights = summed_ ? std::optional<StridedInput>(inputs[3]) : std::nullopt] {
          const KernelTimer busy;
          std::vector<uint32_t> copy, copied, weighted;
          const uint32_t* id = ids.read<uint32_t>(copied);
          const std::vector<int32_t> rows = rows_of(id, tokens * k, map, known, assigner.get());
          if (weights)
            experts_sum(*kernels, e, x.read<float>(copy), rows.data(), weights->read<float>(weighted),
                        tokens, k, out);
          else
            experts(*kernels, e, x.read<float>(copy), rows.data(), tokens, k, out);
        });
  }

 private:
  Experts experts_;
  const Kernels* kernels_;
  std::shared_ptr<const ReplicaAssigner> assigner_;
  bool summed_;
};

class MoePrimitive : public Primitive {
 public:
  MoePrimitive(mx::Stream s, Linear gate, Experts experts, const Kernels* kernels,
               std::shared_ptr<const ReplicaAssigner> assigner, int k, bool normalized, bool normed, float eps, bool add)
      : Primitive(s), gate_(gate), experts_(std::move(experts)), kernels_(kernels), assigner_(std::move(assigner)),
        k_(k), normalized_(normalized), normed_(normed), eps_(eps), add_(add) {}
  const char* name() const override { return "CenacleMoE"; }

  // Inputs: x, which row each id is, the norm's weights if there is one, matrices. Outputs: the sum, and ids.
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    for (auto& o : outputs) o.set_data(mx::allocator::malloc(o.nbytes()));
    enqueue(stream(), outputs[0].nbytes(),
            [x = StridedInput(inputs[0]), map = inputs[1].data<int32_t>(), known = int64_t(inputs[1].size()),
             out = outputs[0].data<float>(), ids = outputs[1].data<uint32_t>(),
             frame = Frame{normed_ ? inputs[2].data<float>() : nullptr, eps_, add_},
             tokens = int64_t(inputs[0].size()) / gate_.matrix.width, gate = gate_, e = experts_, kernels = kernels_,
             ops = &ops(), assigner = assigner_, k = k_, normalized = normalized_] {
              const KernelTimer busy;
              std::vector<uint32_t> copy;
              const auto choose = [&](const float* scores, float* weights) {
                route(scores, tokens, gate.rows, k, normalized, ids, weights);
                return rows_of(ids, tokens * k, map, known, assigner.get());
              };
              moe(*kernels, *ops, gate, e, frame, choose, x.read<float>(copy), tokens, k, out);
            });
  }

 private:
  Linear gate_;
  Experts experts_;
  const Kernels* kernels_;
  std::shared_ptr<const ReplicaAssigner> assigner_;
  int k_;
  bool normalized_, normed_;
  float eps_;
  bool add_;
};

// The matrices, which are inputs too.
Experts raw_experts(const Stack& e, std::vector<mx::array>& inputs) {
  Experts raw{{}, e.down.linear(), e.act, e.a, e.b};
  for (const auto& w : e.in) {
    raw.in.push_back(w.linear());
    w.inputs(inputs);
  }
  e.down.inputs(inputs);
  return raw;
}

}  // namespace

mx::array call_experts(const mx::array& x, const mx::array& ids, const Stack& e,
                       const std::optional<mx::array>& weights) {
  mx::Shape shape = ids.shape();
  if (weights && weights->shape() != shape)
    throw std::invalid_argument("expected a weight for each of the ids");
  if (x.ndim() == 0 || ids.ndim() != x.ndim() || x.shape(-1) != e.in[0].width ||
      !std::equal(shape.begin(), shape.end() - 1, x.shape().begin()))
    throw std::invalid_argument("expected x [..., " + std::to_string(e.in[0].width) +
                                "] and ids [..., k]");
  if (weights) shape.pop_back();
  shape.push_back(int(e.down.rows));
  const mx::Stream s = mx::default_stream(mx::Device::cpu);
  const bool word = ids.dtype() == mx::uint32 || ids.dtype() == mx::int32;
  std::vector<mx::array> inputs{as(x, mx::float32, s), word ? ids : mx::astype(ids, mx::uint32, s),
                                e.map};
  if (weights) inputs.push_back(as(*weights, mx::float32, s));
  Experts raw = raw_experts(e, inputs);
  return mx::array(std::move(shape), mx::float32,
                   std::make_shared<ExpertsPrimitive>(s, std::move(raw), e.down.kernels, e.assigner,
                                                      weights.has_value()),
                   std::move(inputs));
}

std::vector<mx::array> call_moe(const mx::array& x, const Weights& gate, const Stack& e, int k, bool normalized,
                                const std::optional<mx::array>& norm, float eps, bool add) {
  if (x.ndim() == 0 || x.shape(-1) != gate.width || x.shape(-1) != e.in[0].width)
    throw std::invalid_argument("moe: expected x [..., " + std::to_string(e.in[0].width) + "]");
  if (gate.stacked || gate.kernels != e.down.kernels || k < 1 || k > gate.rows)
    throw std::invalid_argument("moe: expected a gate with scores of at least k experts");
  if (add && e.down.rows != x.shape(-1))
    throw std::invalid_argument("moe: expected experts whose output is as wide as their input");
  const mx::Stream s = mx::default_stream(mx::Device::cpu);
  mx::Shape ids = x.shape(), shape = x.shape();
  ids.back() = k, shape.back() = int(e.down.rows);
  std::vector<mx::array> inputs{as(x, mx::float32, s), e.map};
  if (norm) inputs.push_back(norm_weights(*norm, x.shape(-1)));
  Experts raw = raw_experts(e, inputs);
  gate.inputs(inputs);
  return mx::array::make_arrays({std::move(shape), std::move(ids)}, {mx::float32, mx::uint32},
                                std::make_shared<MoePrimitive>(s, gate.linear(), std::move(raw), e.down.kernels,
                                                               e.assigner, k, normalized, norm.has_value(), eps, add),
                                inputs);
}

}  // namespace cenacle
