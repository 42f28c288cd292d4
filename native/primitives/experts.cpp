// The experts of a Mixture-of-Experts layer.
#include "primitives/primitives.h"

namespace cenacle {
namespace {

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
    mx::cpu::get_command_encoder(stream()).dispatch(
        [x = StridedInput(inputs[0]), ids = StridedInput(inputs[1]), map = inputs[2].data<int32_t>(),
         known = int64_t(inputs[2].size()), out, tokens, k, e = experts_,
         kernels = kernels_, assigner = assigner_,
         weights = summed_ ? std::optional<StridedInput>(inputs[3]) : std::nullopt] {
          const KernelTimer busy;
          std::vector<uint32_t> copy, copied, weighted;
          const uint32_t* id = ids.read<uint32_t>(copied);
          std::vector<int32_t> rows(tokens * k);
          for (int64_t i = 0; i < tokens * k; i++) {
            if (id[i] >= uint64_t(known))
              throw std::runtime_error("expert id " + std::to_string(id[i]) + " of " +
                                       std::to_string(known));
            rows[i] = map[id[i]];
          }
          if (assigner) {  // replicas of what we hold may be computed elsewhere
            std::vector<int64_t> counts(assigner->holders.size(), 0);
            for (int64_t i = 0; i < tokens * k; i++)
              if (id[i] < counts.size()) counts[id[i]]++;
            const std::vector<int> assigned = assigner->assign(counts);
            for (int64_t i = 0; i < tokens * k; i++)
              if (rows[i] >= 0 && assigned[id[i]] != assigner->rank) rows[i] = -1;
          }
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
  Experts raw{{}, e.down.linear(), e.act, e.a, e.b};
  for (const auto& w : e.in) {
    raw.in.push_back(w.linear());
    w.inputs(inputs);
  }
  e.down.inputs(inputs);
  return mx::array(std::move(shape), mx::float32,
                   std::make_shared<ExpertsPrimitive>(s, std::move(raw), e.down.kernels, e.assigner,
                                                      weights.has_value()),
                   std::move(inputs));
}

}  // namespace cenacle
