// Views on a GPU: two kernels that execute commands, with the arithmetic of cpu_kernels.py, rounding included.
//
// crop_of_memory and crop_of_decoded: crop, resize, flip, and the color steps before contrast. They also sum the luma
// of each tile, from which the mean of contrast follows.
// color_to_float and color_to_half: contrast and the color steps after it, gray, blur, solarize, and the output.
//
// A block executes one tile of one view after another. All loops over the pixels of a tile stride over the threads of
// the block, so a block may have any number of threads. Results do not depend on the order of threads or blocks: sums
// are of integers, and a tile is written by one block.
//
// Compiled with --fmad=false, since the CPU rounds each product, and with these definitions:
// the columns of a command (TOP, LEFT, ...), COLUMNS, their number, TILE_WIDTH and TILE_HEIGHT, the pixels of a tile, and
// REACH, the most pixels that the blur reaches to each side.

#ifdef __CUDACC_RTC__
#define DEVICE static __device__ __forceinline__
#define KERNEL extern "C" __global__ void __launch_bounds__(256, 4)
#endif

typedef unsigned char u8;
typedef unsigned short half_bits;
typedef long long i64;

// An array of DALI is a sequence of kernel parameters: meminfo, parent, number of items, bytes of an item, data, the
// shape and the strides. Only the data and parts of the shape are used.
#define DATA(type, name) void *, void *, i64, i64, type *name
#define ARRAY2(type, name) DATA(type, name), i64 name##_rows, i64, i64, i64
#define ARRAY3(type, name) DATA(type, name), i64 name##_height, i64 name##_width, i64, i64, i64, i64
#define ARRAY4(type, name) DATA(type, name), i64 name##_count, i64 name##_size, i64, i64, i64, i64, i64, i64

const int LINES = TILE_WIDTH + TILE_HEIGHT;
const int WEIGHT_BITS = 22, HALF = 1 << (WEIGHT_BITS - 1);
const int TAPS = 32;  // Weights of a filter that are kept; those of larger filters are computed again when needed.

DEVICE int least(int a, int b) { return a < b ? a : b; }
DEVICE int most(int a, int b) { return a > b ? a : b; }
DEVICE float least(float a, float b) { return a < b ? a : b; }
DEVICE float most(float a, float b) { return a > b ? a : b; }

// --- Resizing ---

struct Image {
  const u8 *pixels;
  i64 stride_y, stride_x, stride_c;
  int height, width;
};

// Pillow's triangle filter of one column or row of the view.
struct Filter {
  int first, taps;  // the source pixels
  double center, support, total;
};

DEVICE double exact_weight(const Filter &f, int tap) {
  const double weight = 1.0 - fabs((tap + f.first - f.center + 0.5) / f.support);
  return weight > 0.0 ? weight : 0.0;
}

DEVICE Filter make_filter(int target, int source_px, int target_px) {
  const double scale = (double)source_px / (double)target_px;
  Filter f;
  f.support = scale > 1.0 ? scale : 1.0;
  f.center = (target + 0.5) * scale;
  f.first = most((int)(f.center - f.support + 0.5), 0);
  f.taps = least((int)(f.center + f.support + 0.5), source_px) - f.first;
  f.total = 0.0;
  for (int k = 0; k < f.taps; ++k) f.total += exact_weight(f, k);
  return f;
}

DEVICE int fixed_point_weight(const Filter &f, int tap) {
  return (int)(0.5 + exact_weight(f, tap) / f.total * (double)(1 << WEIGHT_BITS));
}

DEVICE int weight_at(const Filter &f, const int *kept, int tap) {
  return tap < TAPS ? kept[tap] : fixed_point_weight(f, tap);
}

// --- Color ---

struct Color {
  u8 red, green, blue;
};

DEVICE u8 blend(float background, float value, float factor) {
  const float mixed = background + factor * (value - background);
  return (u8)(int)least(most(mixed, 0.0f), 255.0f);
}

DEVICE Color blend(float background, Color c, float factor) {
  return {blend(background, (float)c.red, factor), blend(background, (float)c.green, factor),
          blend(background, (float)c.blue, factor)};
}

DEVICE int luma(Color c) { return (c.red * 19595 + c.green * 38470 + c.blue * 7471 + 0x8000) >> 16; }

// Through Pillow's HSV with 8 bits, as _hue in cpu_kernels.py.
DEVICE Color rotate_hue(Color c, float turns) {
  const int shift = (int)((double)turns * 255.0);
  float r = c.red, g = c.green, b = c.blue;
  const float value = most(r, most(g, b)), low = least(r, least(g, b));
  const float chroma = value - low;
  const float inverse = 1.0f / most(chroma, 1.0f);
  const float rc = (value - r) * inverse, gc = (value - g) * inverse, bc = (value - b) * inverse;
  float sixths = 4.0f + gc - rc;
  sixths = g == value ? 2.0f + rc - bc : sixths;
  sixths = r == value ? bc - gc : sixths;
  float turn = sixths / 6.0f;
  turn = turn < 0.0f ? turn + 1.0f : turn;
  const int hue = ((int)(turn * 255.0f) + shift) & 255;
  const float saturation = (float)(int)(chroma / most(value, 1.0f) * 255.0f) / 255.0f;

  sixths = (float)hue * 6.0f / 255.0f;
  int sector = (int)sixths;
  const float part = sixths - (float)sector;
  sector = sector == 6 ? 0 : sector;
  const float lowest = floorf(value * (1.0f - saturation) + 0.5f);
  const float falling = floorf(value * (1.0f - saturation * part) + 0.5f);
  const float rising = floorf(value * (1.0f - saturation * (1.0f - part)) + 0.5f);
  r = sector == 0 || sector == 5 ? value : sector == 1 ? falling : sector == 4 ? rising : lowest;
  g = sector == 1 || sector == 2 ? value : sector == 0 ? rising : sector == 3 ? falling : lowest;
  b = sector == 3 || sector == 4 ? value : sector == 2 ? rising : sector == 5 ? falling : lowest;
  return {(u8)(int)r, (u8)(int)g, (u8)(int)b};
}

// The steps from `first` to `end` of a command with jitter.
DEVICE Color jitter(Color c, const float *command, int first, int end, float mean) {
  for (int k = first; k < end; ++k) {
    const int step = (int)command[ORDER + k];
    if (step == 0) c = blend(0.0f, c, command[BRIGHTNESS]);
    else if (step == 1) c = blend(mean, c, command[CONTRAST]);
    else if (step == 2) c = blend((float)luma(c), c, command[SATURATION]);
    else c = rotate_hue(c, command[HUE_TURNS]);
  }
  return c;
}

DEVICE int step_of_contrast(const float *command) {
  int k = 0;
  while (k < 3 && (int)command[ORDER + k] != 1) ++k;
  return k;
}

// --- The first kernel ---

struct Tiles {
  int columns, count;
};

DEVICE Tiles tiles_of(int size) {
  const int columns = (size + TILE_WIDTH - 1) / TILE_WIDTH;
  return {columns, columns * ((size + TILE_HEIGHT - 1) / TILE_HEIGHT)};
}

DEVICE void crop_tile(const Image &image, const float *command, int size, int tile, u8 *view, int *sum) {
  __shared__ Filter filters[LINES];
  __shared__ int weights[LINES][TAPS];
  __shared__ int luma_sum;
  const int x0 = tile % tiles_of(size).columns * TILE_WIDTH, y0 = tile / tiles_of(size).columns * TILE_HEIGHT;
  // The file may have changed since its command was drawn: never read out of bounds. The change is detected later.
  const int top = least(most((int)command[TOP], 0), image.height - 1);
  const int left = least(most((int)command[LEFT], 0), image.width - 1);
  const int height = least((int)command[HEIGHT], image.height - top);
  const int width = least((int)command[WIDTH], image.width - left);
  const u8 *crop = image.pixels + top * image.stride_y + left * image.stride_x;

  if (threadIdx.x == 0) luma_sum = 0;
  for (int n = threadIdx.x; n < LINES; n += blockDim.x) {
    const bool is_column = n < TILE_WIDTH;
    const int target = is_column ? x0 + n : y0 + n - TILE_WIDTH;
    if (target >= size) continue;
    const bool flipped = is_column && command[FLIP] != 0.0f;
    filters[n] = make_filter(flipped ? size - 1 - target : target, is_column ? width : height, size);
    for (int k = 0; k < least(filters[n].taps, TAPS); ++k) weights[n][k] = fixed_point_weight(filters[n], k);
  }
  __syncthreads();

  int thread_sum = 0;
  for (int p = threadIdx.x; p < TILE_WIDTH * TILE_HEIGHT; p += blockDim.x) {
    const int column = p % TILE_WIDTH, row = p / TILE_WIDTH + TILE_WIDTH;
    const int x = x0 + column, y = y0 + row - TILE_WIDTH;
    if (x >= size || y >= size) continue;
    const Filter &across = filters[column], &down = filters[row];
    int red = HALF, green = HALF, blue = HALF;
    for (int j = 0; j < down.taps; ++j) {
      const u8 *source = crop + (down.first + j) * image.stride_y + across.first * image.stride_x;
      int row_red = HALF, row_green = HALF, row_blue = HALF;
      for (int k = 0; k < across.taps; ++k) {
        const int weight = weight_at(across, weights[column], k);
        row_red += source[0] * weight;
        row_green += source[image.stride_c] * weight;
        row_blue += source[2 * image.stride_c] * weight;
        source += image.stride_x;
      }
      const int weight = weight_at(down, weights[row], j);
      red += (u8)(row_red >> WEIGHT_BITS) * weight;
      green += (u8)(row_green >> WEIGHT_BITS) * weight;
      blue += (u8)(row_blue >> WEIGHT_BITS) * weight;
    }
    Color c = {(u8)(red >> WEIGHT_BITS), (u8)(green >> WEIGHT_BITS), (u8)(blue >> WEIGHT_BITS)};
    if (command[JITTER] != 0.0f) {
      c = jitter(c, command, 0, step_of_contrast(command), 0.0f);
      thread_sum += luma(c);
    }
    u8 *target = view + 3 * ((i64)y * size + x);
    target[0] = c.red, target[1] = c.green, target[2] = c.blue;
  }
  atomicAdd(&luma_sum, thread_sum);
  __syncthreads();
  if (threadIdx.x == 0) *sum = luma_sum;
}

// Outputs: views [count, size, size, 3] and the sums of luma of their tiles [count, tiles].
// where [count, 4]: the address of the first byte of a view's image, and the strides along its rows, columns, colors.
KERNEL crop_of_memory(ARRAY4(u8, views), ARRAY2(int, sums), ARRAY2(const i64, where), ARRAY2(const float, commands)) {
  const int size = (int)views_size, tiles = tiles_of(size).count;
  for (i64 n = blockIdx.x; n < views_count * tiles; n += gridDim.x) {
    const i64 v = n / tiles, *at = where + 4 * v;
    const float *command = commands + COLUMNS * v;
    const Image image = {(const u8 *)at[0], at[1], at[2], at[3], (int)command[SOURCE_HEIGHT],
                         (int)command[SOURCE_WIDTH]};
    crop_tile(image, command, size, (int)(n % tiles), views + 3 * size * size * v, sums + n);
  }
}

// pixels [height, width, 3]: a decoded image.
KERNEL crop_of_decoded(ARRAY4(u8, views), ARRAY2(int, sums), ARRAY3(const u8, pixels), ARRAY2(const float, commands)) {
  const int size = (int)views_size, tiles = tiles_of(size).count;
  const Image image = {pixels, 3 * pixels_width, 3, 1, (int)pixels_height, (int)pixels_width};
  for (i64 n = blockIdx.x; n < views_count * tiles; n += gridDim.x) {
    const i64 v = n / tiles;
    crop_tile(image, commands + COLUMNS * v, size, (int)(n % tiles), views + 3 * size * size * v, sums + n);
  }
}

// --- The second kernel ---

DEVICE void store(float value, float *target) { *target = value; }

DEVICE void store(float value, half_bits *target) {
#ifdef __CUDACC_RTC__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(*target) : "f"(value));
#else
  *target = half_of(value);
#endif
}

// The position beside a border whose pixel an outer one mirrors.
DEVICE int mirrored(int at, int size) {
  at = at < 0 ? -at : at;
  return at >= size ? 2 * (size - 1) - at : at;
}

template <typename Output>
DEVICE void color_tile(const u8 *pixels, const int *sums, const float *command, const float *blur_weights, int size,
                       int tile, Output *view) {
  const int ROWS = TILE_HEIGHT + 2 * REACH, COLUMNS_PX = TILE_WIDTH + 2 * REACH;
  __shared__ u8 colors[3][ROWS][COLUMNS_PX];
  __shared__ float rows[ROWS][TILE_WIDTH];
  __shared__ int luma_sum;
  const Tiles tiles = tiles_of(size);
  const int x0 = tile % tiles.columns * TILE_WIDTH, y0 = tile / tiles.columns * TILE_HEIGHT;
  const int width = least(TILE_WIDTH, size - x0), height = least(TILE_HEIGHT, size - y0);
  const bool jittered = command[JITTER] != 0.0f, blurred = REACH > 0 && command[BLUR] != 0.0f;
  const int reach = blurred ? least(REACH, (int)ceil(4.0 * (double)command[SIGMA_PX])) : 0;

  if (threadIdx.x == 0) luma_sum = 0;
  __syncthreads();
  if (jittered) {
    int thread_sum = 0;
    for (int n = threadIdx.x; n < tiles.count; n += blockDim.x) thread_sum += sums[n];
    atomicAdd(&luma_sum, thread_sum);
  }
  __syncthreads();
  const float mean = (float)(int)((double)luma_sum / (double)(size * size) + 0.5);
  const int wide = width + 2 * reach, high = height + 2 * reach;
  for (int p = threadIdx.x; p < wide * high; p += blockDim.x) {
    const int x = mirrored(x0 + p % wide - reach, size), y = mirrored(y0 + p / wide - reach, size);
    const u8 *at = pixels + 3 * ((i64)y * size + x);
    Color c = {at[0], at[1], at[2]};
    if (jittered) c = jitter(c, command, step_of_contrast(command), 4, mean);
    if (command[GRAY] != 0.0f) c.red = c.green = c.blue = (u8)luma(c);
    colors[0][p / wide][p % wide] = c.red;
    colors[1][p / wide][p % wide] = c.green;
    colors[2][p / wide][p % wide] = c.blue;
  }
  __syncthreads();
  for (int c = 0; c < 3; ++c) {
    if (blurred) {
      for (int p = threadIdx.x; p < width * high; p += blockDim.x) {
        const u8 *at = &colors[c][p / width][p % width];
        float sum = 0.0f;
        for (int k = 0; k <= 2 * reach; ++k) sum += (float)at[k] / 255.0f * blur_weights[k];
        rows[p / width][p % width] = sum;
      }
      __syncthreads();
    }
    for (int p = threadIdx.x; p < width * height; p += blockDim.x) {
      const int x = p % width, y = p / width;
      float value = 0.0f;
      if (blurred)
        for (int k = 0; k <= 2 * reach; ++k) value += rows[y + k][x] * blur_weights[k];
      else
        value = (float)colors[c][y][x] / 255.0f;
      if (command[SOLARIZE] != 0.0f) value = least(value, 1.0f - value);
      store(value, view + 3 * ((i64)(y0 + y) * size + x0 + x) + c);
    }
    __syncthreads();
  }
}

// blur_weights [count, 2 REACH + 1]: the kernels of the blurs, 0 beyond their ends.
#define COLOR_KERNEL(name, output)                                                                                  \
  KERNEL name(ARRAY4(output, views), ARRAY4(const u8, pixels), ARRAY2(const int, sums), ARRAY2(const float, commands), \
              ARRAY2(const float, blur_weights)) {                                                                  \
    const int size = (int)views_size, tiles = tiles_of(size).count;                                                 \
    for (i64 n = blockIdx.x; n < views_count * tiles; n += gridDim.x) {                                             \
      const i64 v = n / tiles, first = 3 * size * size * v;                                                         \
      color_tile(pixels + first, sums + tiles * v, commands + COLUMNS * v, blur_weights + (2 * REACH + 1) * v, size, \
                 (int)(n % tiles), views + first);                                                                  \
    }                                                                                                               \
  }

COLOR_KERNEL(color_to_float, float)
COLOR_KERNEL(color_to_half, half_bits)
