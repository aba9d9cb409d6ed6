// A linear layer whose weight is kept in NF4: an eighth of the bytes of float32, and no copy of it in floats.
//
// The idea: for few rows of x, 8 shuffles turn a register of 32-bit words into the values of 8 codes each, which are
// multiplied at once; x is brought into the words' order beforehand. A zero of the codes is taken off once for a word,
// with the sum of its 8 numbers of x. For many rows, a tile of the weight that stays in
// the first cache is made into floats and multiplied by all of them.
#include <vector>

#include "dots.h"
#include "nf4_codes.h"
#include "parallel.h"
#include "tile.h"

namespace {

constexpr int FEW = 8;                       // rows of x for which codes are multiplied where they are looked up
constexpr int CHUNK = 8 * LANES;             // weights whose codes fill a register
constexpr int64_t BLOCK_WEIGHTS = 1 << 18;   // for one call of the parallel loop
constexpr int TILE_ROWS = 48, TILE_DEPTH = 128;

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Whether rows begin with whole words, and the scales of a chunk's words are found by one shuffle: a block is then a
// power of two.
bool regular(const Nf4Linear& call) {
  return LANES >= 8 && call.Din % 8 == 0 && call.weight.block % 8 == 0 && CHUNK % call.weight.block == 0;
}

// x (M, Din) so that lane i of register s of a chunk has what belongs to the code in bits 4 s of word i; then zeros.
template <class T>
std::vector<float> in_word_order(const Nf4Linear& call) {
  const int64_t width = round_up(call.Din, CHUNK);
  std::vector<float> x(call.M * width);
  for (int m = 0; m < call.M; ++m) {
    const T* numbers = static_cast<const T*>(call.x) + m * call.x_row;
    for (int64_t begin = 0; begin < call.Din; begin += CHUNK) {
      float* to = x.data() + m * width + begin;
      const int words = std::min<int64_t>(CHUNK, call.Din - begin) / 8;
      for (int word = 0; word < words; ++word)
        for (int i = 0; i < 8; ++i) to[(i ^ 1) * LANES + word] = to_float(numbers[begin + 8 * word + i]);
    }
  }
  return x;
}

// x (M, Din) in the order of words, summed over the 8 numbers of each.
std::vector<float> word_sums(const std::vector<float>& x) {
  std::vector<float> sums(x.size() / 8);
  for (size_t i = 0; i < x.size(); i += CHUNK) {
    Vec sum{};
    for (int s = 0; s < 8; ++s) sum += load(&x[i + s * LANES]);
    store(&sums[i / 8], sum);
  }
  return sums;
}

// The scales of all weights of some rows, and their zeros if they have any.
struct Scales {
  const Nf4& w;
  int64_t first;  // block
  std::vector<float> values, zeros;

  Scales(const Nf4Linear& call, int64_t begin, int64_t rows) : w(call.weight), first(begin * call.Din / w.block) {
    const int64_t count = ((begin + rows) * call.Din + w.block - 1) / w.block - first;
    values.resize(count + 2 * LANES);  // whole registers are read
    read_scales(w, first, count, values.data());
    if (!w.zero) return;
    zeros.resize(values.size());
    std::copy_n(w.zero + first, count, zeros.data());
  }
  const float* from(int64_t weight) const { return values.data() + (weight / w.block - first); }
};

// Outputs [begin, begin + RUNS * length): run r has those from begin + r * length on.
template <int M, int RUNS, class T>
void multiply_codes(const Nf4Linear& call, const Book& book, const Scales& all_scales, const float* x,
                    const float* x_sums, int64_t begin, int64_t length) {
  const Nf4& w = call.weight;
  const int64_t width = round_up(call.Din, CHUNK);
  const int chunk_scales = CHUNK / w.block;
  const T* bias = static_cast<const T*>(call.bias);
  T* y = static_cast<T*>(call.y);
  const int block_bits = __builtin_ctz(w.block);
  IntVec first_of_word;
  for (int i = 0; i < LANES; ++i) first_of_word[i] = 8 * i;
  for (int64_t o = begin; o < begin + length; ++o) {
    const uint8_t* codes[RUNS];
    int64_t scales[RUNS];  // where those of the row begin
    IntVec scale_of_word[RUNS];
    for (int r = 0; r < RUNS; ++r) {
      const int64_t start = (o + r * length) * call.Din;
      codes[r] = w.codes + start / 2;
      scales[r] = (start >> block_bits) - all_scales.first;
      scale_of_word[r] = (first_of_word + int(start & (w.block - 1))) >> block_bits;  // a row may begin within a block
    }
    Vec sums[LANES] = {};
    const auto chunk = [&](int64_t k, auto words_at) {
      UintVec words[RUNS];
      Vec parts[RUNS][M] = {};
#pragma GCC unroll 4
      for (int r = 0; r < RUNS; ++r) {
        __builtin_prefetch(codes[r] + k / 2 + AHEAD, 0, 2);
        words[r] = words_at(codes[r] + k / 2);
      }
#pragma GCC unroll 8
      for (int s = 0; s < 8; ++s)
#pragma GCC unroll 4
        for (int r = 0; r < RUNS; ++r) {
          const Vec values = book(words[r] >> (4 * s));
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) parts[r][m] += values * load(x + m * width + k + s * LANES);
        }
#pragma GCC unroll 4
      for (int r = 0; r < RUNS; ++r) {
        if (w.zero) {
          const Vec zero = __builtin_shuffle(load(&all_scales.zeros[scales[r]]), scale_of_word[r]);
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) parts[r][m] -= zero * load(x_sums + (m * width + k) / 8);
        }
        const Vec scale = __builtin_shuffle(load(&all_scales.values[scales[r]]), scale_of_word[r]);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) sums[r * M + m] += scale * parts[r][m];
        scales[r] += chunk_scales;
      }
    };
    int64_t k = 0;
    for (; k + CHUNK <= call.Din; k += CHUNK)
      chunk(k, [](const uint8_t* p) {
        UintVec words;
        std::memcpy(&words, p, sizeof words);
        return words;
      });
    if (k < call.Din)
      chunk(k, [&](const uint8_t* p) {
        UintVec words{};
        std::memcpy(&words, p, (call.Din - k) / 2);
        return words;
      });
    float totals[LANES];
    store(totals, lane_sums(sums));
    for (int r = 0; r < RUNS; ++r)
      for (int m = 0; m < M; ++m) {
        const int64_t at = o + r * length;
        store_one(y + m * call.y_row + at, totals[r * M + m] + (bias ? to_float(bias[at]) : 0.0f));
      }
  }
}

template <int M, class T>
void few_rows(const Nf4Linear& call) {
  constexpr int RUNS = LANES / 4 / M > 1 ? LANES / 4 / M : 1;
  const Book book(call.weight.book);
  const std::vector<float> x = in_word_order<T>(call);
  const std::vector<float> sums = call.weight.zero ? word_sums(x) : std::vector<float>();
  const int64_t block = std::max<int64_t>(BLOCK_WEIGHTS / call.Din / RUNS, 1) * RUNS;
  parallel((call.Dout + block - 1) / block, [&](int64_t i) {
    const int64_t begin = i * block, count = std::min<int64_t>(block, call.Dout - begin), length = count / RUNS;
    const Scales scales(call, begin, count);
    multiply_codes<M, RUNS, T>(call, book, scales, x.data(), sums.data(), begin, length);
    multiply_codes<M, 1, T>(call, book, scales, x.data(), sums.data(), begin + length * RUNS, count - length * RUNS);
  });
}

// y^T = W x^T, a tile of W at a time.
template <class T>
void tiles(const Nf4Linear& call) {
  const Nf4& w = call.weight;
  const Book book(w.book);
  const int64_t columns = round_up(call.M, LANES);
  std::vector<float> xt(call.Din * columns);
  for (int m = 0; m < call.M; ++m)
    for (int64_t k = 0; k < call.Din; ++k)
      xt[k * columns + m] = to_float(static_cast<const T*>(call.x)[m * call.x_row + k]);
  const T* bias = static_cast<const T*>(call.bias);
  parallel((call.Dout + TILE_ROWS - 1) / TILE_ROWS, [&](int64_t i) {
    const int64_t begin = i * TILE_ROWS;
    const int rows = std::min<int64_t>(TILE_ROWS, call.Dout - begin);
    std::vector<float> numbers(TILE_ROWS * TILE_DEPTH), yt(rows * columns), part(rows * columns);
    const Scales scales(call, begin, rows);
    for (int64_t k = 0; k < call.Din; k += TILE_DEPTH) {
      const int depth = std::min<int64_t>(TILE_DEPTH, call.Din - k);
      for (int r = 0; r < rows; ++r) {
        const int64_t from = (begin + r) * call.Din + k;
        read_weights(w, book, scales.from(from), from, depth, numbers.data() + r * TILE_DEPTH);
      }
      tile_product(part.data(), columns, numbers.data(), TILE_DEPTH, 1, xt.data() + k * columns, columns, rows, columns,
                   depth, false);
      for (int64_t j = 0; j < rows * columns; j += LANES)  // a sum of sums: its roundings add up to less
        store(&yt[j], load(&yt[j]) + load(&part[j]));
    }
    for (int m = 0; m < call.M; ++m)
      for (int r = 0; r < rows; ++r)
        store_one(static_cast<T*>(call.y) + m * call.y_row + begin + r,
                  yt[r * columns + m] + (bias ? to_float(bias[begin + r]) : 0.0f));
  });
}

template <class T>
void linear(const Nf4Linear& call) {
  if (call.M > FEW || !regular(call)) return tiles<T>(call);
  switch (call.M) {
    case 1: return few_rows<1, T>(call);
    case 2: return few_rows<2, T>(call);
    case 3: return few_rows<3, T>(call);
    case 4: return few_rows<4, T>(call);
    case 5: return few_rows<5, T>(call);
    case 6: return few_rows<6, T>(call);
    case 7: return few_rows<7, T>(call);
    case 8: return few_rows<8, T>(call);
  }
}

}  // namespace

extern "C" void minillm_cpu_nf4_linear(const Nf4Linear* call) {
  call->dtype == FLOAT32 ? linear<float>(*call) : linear<bfloat16>(*call);
}
