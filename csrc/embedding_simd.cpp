// Gradients of an embedding table on the CPU.  Compiled once for each vector unit.
#include "embedding.h"

#include "simd_math.h"

namespace superbert::SUPERBERT_ISA {
namespace {

// Rows are summed by blocks of so many, so that rounding errors grow with the number of blocks and
// not with that of rows.
constexpr int64_t kBlock = 32;

void add_to_row(const TableGradient& call, const int64_t* stream_rows, int64_t count,
                int64_t table_row, int64_t begin, int64_t end) {
  float total[EmbeddingKernels::kColumns] = {}, block[EmbeddingKernels::kColumns];
  const int64_t width = end - begin;
  with_storage(call.storage, [&]<typename T>(const T*) {
    const T* gradient = static_cast<const T*>(call.gradient) + begin;
    for (int64_t first = 0; first < count; first += kBlock) {
      fill(block, width, 0);
      for (int64_t r = first; r < smaller(first + kBlock, count); ++r) {
        const T* row = gradient + stream_rows[r] * call.width;
        for_row(width, [&](int64_t i, auto lanes) {
          lanes.store(block + i, lanes.load(block + i) + lanes.load(row + i));
        });
      }
      for_row(width, [&](int64_t i, auto lanes) {
        lanes.store(total + i, lanes.load(total + i) + lanes.load(block + i));
      });
    }
    T* table = static_cast<T*>(call.table) + table_row * call.width + begin;
    for_row(width, [&](int64_t i, auto lanes) {
      lanes.store(table + i, lanes.load(table + i) + lanes.load(total + i));
    });
  });
}

} // namespace

extern const EmbeddingKernels embedding_kernels;
const EmbeddingKernels embedding_kernels = {add_to_row};

} // namespace superbert::SUPERBERT_ISA
