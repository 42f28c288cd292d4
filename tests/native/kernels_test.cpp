// Every kernel set that this processor can run, against weights decoded here value by value and
// summed in double precision: all formats, odd shapes and token counts, one bound for each output.
//
// Weights, scales and activations end where a page ends that nobody may read beyond.
// Prints a line for each set; exits with 1 and the first differences if any output is out of bounds.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "layers/layers.h"
#include "kernels/repack.h"
#include "thread_pool.h"

namespace cenacle {
namespace {

int failures = 0;

void fail(const Kernels& k, const std::string& what) {
  if (++failures <= 20) std::printf("FAILED %s: %s\n", k.name, what.c_str());
}

// `n` values whose last one is the last before an unreadable page.
template <class T>
class Edge {
 public:
  explicit Edge(size_t n) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    bytes_ = (n * sizeof(T) + page - 1) / page * page + page;
    base_ = static_cast<char*>(
        mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + bytes_ - page, page, PROT_NONE) != 0) std::abort();
    data_ = reinterpret_cast<T*>(base_ + bytes_ - page - n * sizeof(T));
  }
  ~Edge() { munmap(base_, bytes_); }
  Edge(const Edge&) = delete;
  T* get() { return data_; }

 private:
  char* base_;
  size_t bytes_;
  T* data_;
};

std::mt19937 dice(7);

float normal() { return std::normal_distribution<float>()(dice); }

// A float as the nearest value of `type`, and its bits there.
float rounded(Float type, float x, uint8_t* to) {
  if (type == Float::f32) {
    std::memcpy(to, &x, 4);
    return x;
  }
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if (type == Float::bf16) {
    u += 0x8000;
    const auto h = uint16_t(u >> 16);
    std::memcpy(to, &h, 2);
    u &= 0xffff0000;
    std::memcpy(&x, &u, 4);
    return x;
  }
  // Normal halves only; 10 bits of fraction, cut off.
  int exponent;
  const float fraction = std::frexp(std::fabs(x), &exponent);
  if (exponent < -13) {
    std::memset(to, 0, 2);
    return 0.f;
  }
  const int bits = int(fraction * 2048) - 1024;
  const auto h = uint16_t((x < 0 ? 0x8000 : 0) | (exponent + 14) << 10 | bits);
  std::memcpy(to, &h, 2);
  return std::copysign(std::ldexp(float(bits + 1024), exponent - 11), x);
}

// A matrix with what each of its weights is, and what it is made of: code * scale + bias.
struct Case {
  Matrix m{};
  std::vector<double> value, parts;  // parts: |code * scale| + |bias|, the size of what cancels
  std::vector<std::unique_ptr<Edge<uint8_t>>> memory;
  std::string name;
};

uint8_t* keep(Case& c, size_t n) {
  c.memory.push_back(std::make_unique<Edge<uint8_t>>(n));
  return c.memory.back()->get();
}

const char* const kFloats[] = {"f32", "bf16", "f16"};
const char* const kFormats[] = {"dense", "affine", "mxfp4", "nvfp4", "mxfp8", "fp8"};

// Four bits of exponent, three of mantissa.
double e4m3_of(uint8_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const double size = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  return code & 0x80 ? -size : size;
}

uint8_t draw_e4m3() {
  const auto code = uint8_t(dice());
  return (code & 0x7f) == 0x7f ? code & 0x80 : code;
}

Case make(Format format, Float type, int bits, int group, int64_t rows, int64_t width) {
  Case c;
  Matrix& m = c.m;
  m = {format, type, bits, group, nullptr, nullptr, nullptr, rows, width, 0, 0};
  c.value.resize(rows * width);
  c.parts.resize(rows * width);
  const int size = type == Float::f32 ? 4 : 2;
  c.name = std::string(kFormats[int(format)]) + " " + kFloats[int(type)] + " " + std::to_string(bits) + " bits, groups of " +
           std::to_string(group) + ", " + std::to_string(rows) + " x " + std::to_string(width);
  if (format == Format::dense) {
    m.weight_stride = width * size;
    uint8_t* w = keep(c, rows * m.weight_stride);
    m.weight = w;
    for (int64_t i = 0; i < rows * width; i++)
      c.parts[i] = std::fabs(c.value[i] = rounded(type, normal(), w + i * size));
    return c;
  }
  const int64_t groups = width / group;
  m.weight_stride = width * bits / 8;
  uint8_t* w = keep(c, rows * m.weight_stride);
  m.weight = w;
  std::memset(w, 0, rows * m.weight_stride);
  const bool floats = format == Format::affine || format == Format::fp8;
  m.scale_stride = groups * (floats ? size : 1);
  uint8_t* scales = keep(c, rows * m.scale_stride);
  m.scales = scales;
  uint8_t* biases = format == Format::affine ? keep(c, rows * m.scale_stride) : nullptr;
  m.biases = biases;
  const double e2m1[16] = {0, .5, 1, 1.5, 2, 3, 4, 6, -0., -.5, -1, -1.5, -2, -3, -4, -6};
  for (int64_t row = 0; row < rows; row++) {
    for (int64_t g = 0; g < groups; g++) {
      double scale, bias = 0;
      if (format == Format::nvfp4) {
        const uint8_t e = scales[row * m.scale_stride + g] = draw_e4m3();
        scale = e4m3_of(e);
      } else if (!floats) {
        const auto e = uint8_t(std::uniform_int_distribution<>(118, 130)(dice));
        scales[row * m.scale_stride + g] = e;
        scale = std::ldexp(1.0, e - 127);
      } else {
        const int64_t at = row * m.scale_stride + g * size;
        scale = rounded(type, 2 * normal() / float(1 << bits), scales + at);
        if (format == Format::affine) bias = rounded(type, float(-scale) * float(1 << (bits - 1)) + .1f * normal(), biases + at);
      }
      for (int64_t i = g * group; i < (g + 1) * group; i++) {
        const uint32_t code = is_e4m3(m) ? draw_e4m3() : dice() & ((1u << bits) - 1);
        for (int b = 0; b < bits; b++) {
          const int64_t bit = i * bits + b;
          w[row * m.weight_stride + bit / 8] |= uint8_t((code >> b & 1) << (bit % 8));
        }
        const double q = is_e2m1(m) ? e2m1[code] : is_e4m3(m) ? e4m3_of(uint8_t(code)) : double(code);
        c.value[row * width + i] = q * scale + bias;
        c.parts[row * width + i] = std::fabs(q * scale) + std::fabs(bias);
      }
    }
  }
  return c;
}

int bits_of(Layout l) { return l.interleave == Interleave::int8_quads || l.interleave == Interleave::int8_quads_even ? 8 : 16; }

constexpr int64_t GUARD = 3;  // outputs before and after that must stay as they were

// out[token][row] of `tokens` of x, in calls of at most `most` tokens and `step` rows.
std::vector<float> run(const Kernels& k, const Matrix& m, const float* x, int64_t tokens,
                       int64_t most, int64_t step) {
  const Layout l = k.choose(m);
  const int64_t groups = groups_of(l, m.width), bytes = bytes_of(l, m.width);
  Edge<uint8_t> fixed(tokens * bytes);
  Edge<float> scales(tokens * groups), sums(tokens * groups), scratch(k.scratch(m));
  if (l.interleave != Interleave::none)
    for (int64_t t = 0; t < tokens; t++)
      k.prepare(l, m.width, x + t * m.width, fixed.get() + t * bytes, scales.get() + t * groups,
                sums.get() + t * groups);
  const Activations a{l, m.width, x, fixed.get(), scales.get(), sums.get()};
  std::vector<float> out(tokens * m.rows + 2 * GUARD, 42.f);
  for (int64_t begin = 0; begin < tokens; begin += most)
    for (int64_t first = 0; first < m.rows; first += step) {
      int32_t which[TOKENS];
      float* to[TOKENS];
      int count = 0;
      // Last token first: their order is the caller's.
      for (int64_t t = std::min(tokens, begin + most) - 1; t >= begin; t--, count++) {
        which[count] = int32_t(t);
        to[count] = out.data() + GUARD + t * m.rows + first;
      }
      k.multiply(m, first, std::min(m.rows, first + step), a, which, count, to, scratch.get());
    }
  for (int64_t i = 0; i < GUARD; i++)
    if (out[i] != 42.f || out[out.size() - 1 - i] != 42.f) fail(k, "wrote outside its rows");
  return {out.begin() + GUARD, out.end() - GUARD};
}

// The matrix as a set wants it, with real rows; what it is packed into ends at an edge too.
Matrix as_wanted(const Kernels& k, Case& c) {
  if (!k.packs(c.m)) return c.m;
  uint8_t* to = keep(c, packed_bytes(c.m));
  pack(c.m, to);
  return packed(c.m, to);
}

void check_unpack(const Kernels& k, const Case& c, const Matrix& m, const float* x) {
  const Matrix& p = c.m;
  std::vector<uint8_t> w(p.rows * p.weight_stride), s(p.rows * p.scale_stride), b(s.size());
  unpack(m, 0, p.rows, w.data(), s.data(), p.biases ? b.data() : nullptr);
  if (std::memcmp(w.data(), p.weight, w.size()) || std::memcmp(s.data(), p.scales, s.size()) ||
      (p.biases && std::memcmp(b.data(), p.biases, b.size())))
    fail(k, c.name + ": unpacked it is not what was packed");
  if (run(portable, m, x, 1, 1, p.rows) != run(portable, p, x, 1, 1, p.rows))
    fail(k, c.name + ": packed rows are decoded to other values");
}

double worst = 0;  // share of its bound that any output has used

void check(const Kernels& k, Case c, int64_t tokens, int bits = 16) {
  Matrix m = as_wanted(k, c);
  m.activations = bits;
  Edge<float> memory(tokens * m.width);
  float* x = memory.get();
  for (int64_t i = 0; i < tokens * m.width; i++)
    x[i] = normal() * (i % 97 == 5 ? 30.f : 1.f);  // some stand out, as in models
  if (m.packed) check_unpack(k, c, m, x);
  const auto out = run(k, m, x, tokens, TOKENS, m.rows);
  const Layout l = k.choose(m);
  const bool integers = l.interleave != Interleave::none && l.interleave != Interleave::float_quads;
  // Half a step of the activations' integers.
  const double half = bits_of(l) == 8 ? 1 / 253.9 : 1 / 65000.;
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t row = 0; row < m.rows; row++) {
      double sum = 0, rounding = 0, steps = 0;
      for (int64_t g = 0, group_size = integers ? l.group : m.width; g < m.width; g += group_size) {
        double top = 0, weights = 0;
        for (int64_t i = g; i < g + group_size; i++) {
          const double v = x[t * m.width + i], w = c.value[row * m.width + i];
          sum += w * v;
          rounding += c.parts[row * m.width + i] * std::fabs(v);
          top = std::max(top, std::fabs(v));
          weights += std::fabs(w);
        }
        steps += weights * top * half;
      }
      const double bound = 1e-6 * rounding + (integers ? steps : 0.);
      const double off = std::fabs(double(out[t * m.rows + row]) - sum);
      worst = std::max(worst, off / bound);
      if (!(off <= bound))
        fail(k, c.name + ", token " + std::to_string(t) + " of " + std::to_string(tokens) +
                    ", row " + std::to_string(row) + ": expected " + std::to_string(sum) +
                    " within " + std::to_string(bound) + ", got " +
                    std::to_string(out[t * m.rows + row]));
    }
  for (const int64_t most : {1, 2, 5})
    for (const int64_t step : {m.packed ? ROWS_PER_PACK : 3, m.rows}) {
      const auto other = run(k, m, x, tokens, most, step);
      if (std::memcmp(out.data(), other.data(), out.size() * sizeof(float)) != 0)
        fail(k, c.name + ": other bits in calls of " + std::to_string(most) + " tokens and " +
                    std::to_string(step) + " rows");
    }
}

void check_special(const Kernels& k, Case c, int bits = 16) {
  Matrix m = as_wanted(k, c);
  m.activations = bits;
  for (const float odd : {0.f, 1e-38f, std::numeric_limits<float>::infinity(), std::nanf("")}) {
    std::vector<float> x(m.width, 0.f);
    x[m.width / 2] = odd;
    for (const float y : run(k, m, x.data(), 1, 1, m.rows))
      if (std::isfinite(odd) ? !(std::fabs(y) < 1e-30f) : std::isfinite(y))
        fail(k, c.name + ": " + std::to_string(y) + " of an activation " + std::to_string(odd));
  }
}

void check_activate(const Kernels& k) {
  const double inf = std::numeric_limits<double>::infinity();
  const auto sigmoid = [](double z) { return 1 / (1 + std::exp(-z)); };
  const auto clip = [](double z, double l) { return std::min(std::max(z, -l), l); };
  const auto tanh_gelu = [](double z) {
    return z / 2 * (1 + std::tanh(std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z)));
  };
  std::vector<float> gates, ups;
  for (int i = 0; i < 1003; i++) {
    gates.push_back(i < 7 ? float(i - 3) * 40.f : 3 * normal());
    ups.push_back(2 * normal());
  }
  for (int act = 0; act <= int(Activation::relu2); act++) {
    const double a = 1.7, b = 2.5;
    std::vector<float> got = gates;
    k.activate(Activation(act), float(a), float(b), got.data(), ups.data(), int64_t(got.size()));
    for (size_t i = 0; i < got.size(); i++) {
      const double g = gates[i], u = ups[i], af = float(a), bf = float(b);
      double want = inf;
      switch (Activation(act)) {
        case Activation::swiglu: want = g * sigmoid(g) * u; break;
        case Activation::gpt_oss: want = (clip(u, bf) + 1) * std::min(g, bf) * sigmoid(af * std::min(g, bf)); break;
        case Activation::geglu: want = tanh_gelu(g) * u; break;
        case Activation::clipped: want = std::min(g, af) * sigmoid(std::min(g, af)) * clip(u, af); break;
        case Activation::capped: want = std::min(g * sigmoid(g), af) * clip(u, af); break;
        case Activation::situ: want = af * std::tanh(g / af) * sigmoid(g) * bf * std::tanh(u / bf); break;
        case Activation::gelu_tanh: want = tanh_gelu(g); break;
        case Activation::gelu_erf: want = g * std::erfc(-g / std::sqrt(2.0)) / 2; break;
        case Activation::gelu_fast: want = g * sigmoid(1.702 * g); break;
        case Activation::relu2: want = g > 0 ? g * g : 0; break;
      }
      // Where 1 + erf cancels the error is one of 1, not of the result.
      const double bound = 2e-6 * (std::fabs(want) + std::fabs(g) * 1e-1) + 1e-30;
      if (!(std::fabs(got[i] - want) <= bound))
        fail(k, "activation " + std::to_string(act) + " of " + std::to_string(g) + ", " +
                    std::to_string(u) + ": expected " + std::to_string(want) + ", got " +
                    std::to_string(got[i]));
    }
  }
}

// The whole feed-forward: threads, tasks, absent experts; against the portable set.
void check_experts(const Kernels& k) {
  const int64_t width = 192, hidden = 160, count = 3, tokens = 37, top = 2;
  Case gate = make(Format::affine, Float::bf16, 4, 32, count * hidden, width);
  Case up = make(Format::affine, Float::f16, 8, 64, count * hidden, width);
  Case down = make(Format::affine, Float::f32, 6, 32, count * width, hidden);
  std::vector<float> bias(count * hidden), x(tokens * width);
  for (float& v : bias) v = normal();
  for (float& v : x) v = normal() / 8;
  std::vector<int32_t> rows(tokens * top);
  for (int32_t& r : rows) r = std::uniform_int_distribution<int32_t>(-1, int32_t(count) - 1)(dice);
  const auto of = [&](const Kernels& k) {
    return Experts{{{as_wanted(k, gate), bias.data(), hidden, count}, {as_wanted(k, up), nullptr, hidden, count}},
                   {as_wanted(k, down), nullptr, width, count}, Activation::swiglu, 0, 0};
  };
  std::vector<float> want(tokens * top * width), got(want.size());
  experts(portable, of(portable), x.data(), rows.data(), tokens, top, want.data());
  experts(k, of(k), x.data(), rows.data(), tokens, top, got.data());
  double off = 0, all = 0;
  for (size_t i = 0; i < want.size(); i++) {
    off += (got[i] - want[i]) * (got[i] - want[i]);
    all += want[i] * want[i];
    if (rows[i / width] < 0 && got[i] != 0.f) fail(k, "an absent expert is not zero");
  }
  if (!(std::sqrt(off / all) < 1e-4)) fail(k, "experts: off by " + std::to_string(std::sqrt(off / all)));
}

void check_all(const Kernels& k) {
  worst = 0;
  const int before = failures;
  for (const Float type : {Float::f32, Float::bf16, Float::f16}) {
    for (const auto& [rows, width] : {std::pair<int64_t, int64_t>{1, 1}, {5, 7}, {19, 64}, {6, 203}})
      for (const int64_t tokens : {1, 2, 3, 4, 7}) check(k, make(Format::dense, type, 0, 0, rows, width), tokens);
    for (const int bits : {2, 3, 4, 5, 6, 8})
      for (const int group : {32, 64, 128})
        for (const int64_t groups : {1, 3, 10})
          check(k, make(Format::affine, type, bits, group, groups == 3 ? 35 : 3, groups * group),
                groups == 1 ? 7 : 1 + (bits + group) % 5);
  }
  for (const int64_t groups : {1, 2, 3, 11})
    for (const int64_t tokens : {1, 3, 6})
      check(k, make(Format::mxfp4, Float::f32, 4, 32, 18, groups * 32), tokens);
  for (const int64_t tokens : {1, 2, 3, 8, 33}) {
    for (const int64_t groups : {1, 2, 3, 4, 7, 24})
      for (const int64_t rows : {1, 18, 32}) check(k, make(Format::nvfp4, Float::f32, 4, 16, rows, groups * 16), tokens);
    for (const int64_t groups : {1, 2, 11})
      for (const int64_t rows : {1, 18, 32}) {
        check(k, make(Format::mxfp8, Float::f32, 8, 32, rows, groups * 32), tokens);
        for (const Float type : {Float::f32, Float::bf16, Float::f16})
          for (const int group : {32, 64, 128}) check(k, make(Format::fp8, type, 8, group, rows, groups * group), tokens);
      }
  }
  check(k, make(Format::affine, Float::bf16, 4, 64, 2, 2048), TOKENS);
  // Activations of 8 bits where there are kernels for them; elsewhere it is asked in vain.
  for (const int bits : {2, 4, 8})
    for (const int group : {32, 64, 128})
      for (const int64_t tokens : {1, 3, 15})
        check(k, make(Format::affine, Float::bf16, bits, group, 21, 3 * group), tokens, 8);
  check(k, make(Format::mxfp4, Float::f32, 4, 32, 18, 96), 6, 8);
  for (const int64_t tokens : {1, 3, 15}) {
    check(k, make(Format::nvfp4, Float::f32, 4, 16, 18, 48), tokens, 8);
    check(k, make(Format::mxfp8, Float::f32, 8, 32, 18, 96), tokens, 8);
  }
  check_special(k, make(Format::affine, Float::bf16, 4, 64, 4, 192), 8);
  for (const int bits : {4, 5, 8}) check_special(k, make(Format::affine, Float::bf16, bits, 64, 4, 192));
  check_special(k, make(Format::mxfp4, Float::f32, 4, 32, 4, 96));
  for (const int64_t width : {48, 128}) check_special(k, make(Format::nvfp4, Float::f32, 4, 16, 4, width));
  check_special(k, make(Format::mxfp8, Float::f32, 8, 32, 4, 96));
  check_special(k, make(Format::fp8, Float::f32, 8, 64, 4, 192));
  check_special(k, make(Format::dense, Float::bf16, 0, 0, 4, 100));
  check_activate(k);
  check_experts(k);
  std::printf("%s: %s, at most %.2f of the bound\n", k.name, failures > before ? "FAILED" : "ok", worst);
}

}  // namespace
}  // namespace cenacle

int main() {
  for (const cenacle::Kernels* k : cenacle::available_kernels()) cenacle::check_all(*k);
  return cenacle::failures ? 1 : 0;
}
