// The source of the GPU's kernels, compiled for the CPU. The THREADS threads of a block run in parallel, blocks in turn.

#include <atomic>
#include <barrier>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

struct Index {
  unsigned x;
};
static thread_local Index threadIdx, blockIdx;
static const Index blockDim = {THREADS};
static Index gridDim;
static std::barrier<> block_barrier(THREADS);
static void __syncthreads() {
  if (THREADS > 1) block_barrier.arrive_and_wait();
}
static int atomicAdd(int *target, int value) { return __atomic_fetch_add(target, value, __ATOMIC_RELAXED); }
static unsigned short half_of(float value) {
  const _Float16 half = (_Float16)value;
  unsigned short bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}

#define __shared__ static
#define DEVICE static inline
#define KERNEL extern "C" void
#include KERNELS

// Runs a kernel with all of its arguments bound.
template <typename Kernel>
static void launch(int blocks, Kernel kernel) {
  gridDim = {(unsigned)blocks};
  for (int block = 0; block < blocks; ++block) {
    std::vector<std::thread> threads;
    for (int thread = 1; thread < THREADS; ++thread)
      threads.emplace_back([&, thread] {
        threadIdx = {(unsigned)thread}, blockIdx = {(unsigned)block};
        kernel();
      });
    threadIdx = {0}, blockIdx = {(unsigned)block};
    kernel();
    for (auto &thread : threads) thread.join();
  }
}

#define NO_DATA nullptr, nullptr, 0, 0
#define OF2(data) NO_DATA, data, 0, 0, 0, 0
#define OF3(data, height, width) NO_DATA, data, height, width, 3, 0, 0, 0
#define OF4(data, count, size) NO_DATA, data, count, size, size, 3, 0, 0, 0, 0

extern "C" void run_crop_of_memory(int blocks, i64 count, i64 size, u8 *views, int *sums, const i64 *where,
                                   const float *commands) {
  launch(blocks, [&] { crop_of_memory(OF4(views, count, size), OF2(sums), OF2(where), OF2(commands)); });
}

extern "C" void run_crop_of_decoded(int blocks, i64 count, i64 size, u8 *views, int *sums, const u8 *image, i64 height,
                                    i64 width, const float *commands) {
  launch(blocks, [&] {
    crop_of_decoded(OF4(views, count, size), OF2(sums), OF3(image, height, width), OF2(commands));
  });
}

extern "C" void run_color_to_float(int blocks, i64 count, i64 size, float *views, const u8 *pixels, const int *sums,
                                   const float *commands, const float *blur_weights) {
  launch(blocks, [&] {
    color_to_float(OF4(views, count, size), OF4(pixels, count, size), OF2(sums), OF2(commands), OF2(blur_weights));
  });
}

extern "C" void run_color_to_half(int blocks, i64 count, i64 size, half_bits *views, const u8 *pixels, const int *sums,
                                  const float *commands, const float *blur_weights) {
  launch(blocks, [&] {
    color_to_half(OF4(views, count, size), OF4(pixels, count, size), OF2(sums), OF2(commands), OF2(blur_weights));
  });
}

#ifdef MAIN
#include <cstdio>

// Runs the kernels on inputs from a file: the numbers below, then an image, commands and the weights of blurs.
int main(int, char **arguments) {
  FILE *file = std::fopen(arguments[1], "rb");
  i64 numbers[5];
  std::size_t read = std::fread(numbers, sizeof(i64), 5, file);
  const auto [count, size, tiles, height, width] = numbers;
  std::vector<u8> image(height * width * 3), pixels(count * size * size * 3);
  std::vector<float> commands(count * COLUMNS), weights(count * (2 * REACH + 1)), views(pixels.size());
  std::vector<int> sums(count * tiles);
  read += std::fread(image.data(), 1, image.size(), file);
  read += std::fread(commands.data(), sizeof(float), commands.size(), file);
  read += std::fread(weights.data(), sizeof(float), weights.size(), file);
  if (read != 5 + image.size() + commands.size() + weights.size()) return 2;
  std::vector<i64> where;
  for (i64 n = 0; n < count; ++n) where.insert(where.end(), {(i64)image.data(), 3 * width, 3, 1});
  run_crop_of_memory(2, count, size, pixels.data(), sums.data(), where.data(), commands.data());
  run_color_to_float(2, count, size, views.data(), pixels.data(), sums.data(), commands.data(), weights.data());
}
#endif
