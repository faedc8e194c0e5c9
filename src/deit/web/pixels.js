// Turns a decoded picture into pixel_values: the preprocessing of deit's DeiTImageProcessor, number for number.
//
// A picture is {data, height, width}: bytes, four to a pixel (red, green, blue, alpha), row after row. C channels, H
// rows, W columns. Sizes are {height, width}. `options` is the content of preprocessor_config.json.

const BITS = 22;  // fraction of Pillow's weights: 32 bits less 8 for a byte and 2 for sums beyond it
const LARGE = 2 ** 25;  // pixels; of a resized image with more, only the part that the crop keeps is computed

// Pillow's filters by their number in the file, with their reach and their weight at a distance.
const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));
const FILTERS = {
  1: { name: "lanczos", reach: 3, weight: (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0) },
  2: { name: "bilinear", reach: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) },
  3: { name: "bicubic", reach: 2, weight: cubic },
  4: { name: "box", reach: 0.5, weight: (x) => (x > -0.5 && x <= 0.5 ? 1 : 0) },
  5: { name: "hamming", reach: 1, weight: (x) => (Math.abs(x) < 1 ? sinc(x) * hamming(x) : 0) },
};

// Pillow has both constants in single precision.
const hamming = (x) => Math.fround(0.54) + Math.fround(0.46) * Math.cos(Math.PI * x);

function cubic(distance) {
  const x = Math.abs(distance), a = -0.5;  // Keys' kernel
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

// Returns the pixel_values of a picture: {data: Float32Array, dims: [C, H, W]}.
export function pixelValues(picture, options) {
  let image = inChannels(picture, options);
  if (options.do_resize) {
    let size = targetSize(image, options.size), box = { left: 0, top: 0, right: image.width, bottom: image.height };
    if (options.do_center_crop && size.height * size.width > LARGE) [size, box] = middle(box, size, options.crop_size);
    image = resize(image, size, box, FILTERS[options.resample]);
  }
  if (options.do_center_crop) image = centerCrop(image, options.crop_size);
  return normalized(image, options);
}

// Drops alpha without blending. Turns the picture grey if the model has one channel.
function inChannels({ data, height, width }, options) {
  const count = height * width, grey = Array.isArray(options.image_mean) && options.image_mean.length === 1 &&
    !options.do_convert_rgb;
  const channels = grey ? 1 : 3, found = new Uint8Array(count * channels);
  for (let i = 0; i < count; i++) {
    const [red, green, blue] = [data[4 * i], data[4 * i + 1], data[4 * i + 2]];
    if (grey) {
      found[i] = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16;  // ITU-R 601-2, as Pillow rounds it
    } else {
      found[3 * i] = red;
      found[3 * i + 1] = green;
      found[3 * i + 2] = blue;
    }
  }
  return { data: found, height, width, channels };
}

function targetSize({ height, width }, size) {
  if (size.height) return { height: size.height, width: size.width };
  const short = Math.min(height, width), long = Math.max(height, width);
  let edge = size.shortest_edge, newShort = edge;
  if (size.longest_edge && long / short * edge > size.longest_edge) {
    edge = size.longest_edge * short / long;
    newShort = Math.max(1, roundedToEven(edge));
  }
  if (short === newShort) return { height, width };
  const newLong = Math.max(1, Math.floor(edge * long / short));
  return height <= width ? { height: newShort, width: newLong } : { height: newLong, width: newShort };
}

// Rounds as Python does: a half goes to the even neighbour.
function roundedToEven(value) {
  const below = Math.floor(value), rest = value - below;
  return rest < 0.5 || (rest === 0.5 && below % 2 === 0) ? below : below + 1;
}

// Returns the size of what a central crop keeps of a resize to `size`, and the part of the picture that it shows.
// Pillow takes such a part in single precision.
function middle(box, size, crop) {
  const part = (whole, kept, start, end) => {
    const first = Math.max(0, Math.floor((whole - kept) / 2)), scale = (end - start) / whole;
    const side = Math.min(whole, kept);
    return [side, Math.fround(start + first * scale), Math.fround(start + (first + side) * scale)];
  };
  const [height, top, bottom] = part(size.height, crop.height, box.top, box.bottom);
  const [width, left, right] = part(size.width, crop.width, box.left, box.right);
  return [{ height, width }, { left, top, right, bottom }];
}

// Resizes in two passes, first along the rows, and rounds each to bytes, as Pillow does. The filter is widened to what
// a new pixel covers.
function resize(image, size, box, filter) {
  const columns = weights(image.width, box.left, box.right, size.width, filter);
  const rows = weights(image.height, box.top, box.bottom, size.height, filter);
  // As Pillow does since version 13: columns first if they lose more than twice as many pixels as the rows.
  const lost = image.height - size.height, columnsFirst = lost > 0 && lost > 2 * (image.width - size.width);
  return columnsFirst ? alongRows(alongColumns(image, rows), columns) : alongColumns(alongRows(image, columns), rows);
}

// Returns for each new position along one side where its old positions begin, and their weights as whole numbers.
// Returns null if nothing changes.
function weights(length, start, end, count, filter) {
  if (count === length && start === 0 && end === length) return null;
  const scale = (end - start) / count, widened = Math.max(scale, 1), reach = filter.reach * widened;
  return Array.from({ length: count }, (_, i) => {
    const center = start + (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - reach + 0.5));
    const last = Math.min(length, Math.trunc(center + reach + 0.5));
    const exact = new Float64Array(last - first);
    let sum = 0;
    for (let j = 0; j < exact.length; j++) {
      exact[j] = filter.weight((first + j - center + 0.5) * (1 / widened));
      sum += exact[j];
    }
    const whole = Int32Array.from(exact, (weight) => {
      const scaled = (sum === 0 ? weight : weight / sum) * 2 ** BITS;
      return Math.trunc(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
    });
    return { first, whole };
  });
}

const toByte = (sum) => Math.min(255, Math.max(0, sum >> BITS));
const HALF = 1 << (BITS - 1);

function alongRows(image, columns) {
  if (!columns) return image;
  const { data, height, width, channels } = image;
  const count = columns.length, found = new Uint8Array(height * count * channels);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < count; x++) {
      const { first, whole } = columns[x];
      for (let c = 0; c < channels; c++) {
        let sum = HALF;
        for (let j = 0, at = (y * width + first) * channels + c; j < whole.length; j++, at += channels) {
          sum += data[at] * whole[j];
        }
        found[(y * count + x) * channels + c] = toByte(sum);
      }
    }
  }
  return { data: found, height, width: count, channels };
}

function alongColumns(image, rows) {
  if (!rows) return image;
  const { data, width, channels } = image;
  const line = width * channels, found = new Uint8Array(rows.length * line);
  rows.forEach(({ first, whole }, y) => {
    for (let x = 0; x < line; x++) {
      let sum = HALF;
      for (let j = 0, at = first * line + x; j < whole.length; j++, at += line) sum += data[at] * whole[j];
      found[y * line + x] = toByte(sum);
    }
  });
  return { data: found, height: rows.length, width, channels };
}

// Returns the middle of an image. Pixels outside the image are 0.
function centerCrop({ data, height, width, channels }, crop) {
  const top = Math.floor((height - crop.height) / 2), left = Math.floor((width - crop.width) / 2);
  const found = new Uint8Array(crop.height * crop.width * channels);
  const from = Math.max(0, left), to = Math.min(width, left + crop.width);
  for (let y = Math.max(0, top); y < Math.min(height, top + crop.height); y++) {
    const row = data.subarray((y * width + from) * channels, (y * width + to) * channels);
    found.set(row, ((y - top) * crop.width + from - left) * channels);
  }
  return { data: found, height: crop.height, width: crop.width, channels };
}

// Multiplies each channel by a factor and adds a term, in single precision. Returns channels first.
function normalized({ data, height, width, channels }, options) {
  const count = height * width, found = new Float32Array(count * channels);
  const of = (statistic, c) => (Array.isArray(statistic) ? statistic[c] : statistic);
  for (let c = 0; c < channels; c++) {
    let factor = options.do_rescale ? options.rescale_factor : 1, term = 0;
    if (options.do_normalize) {
      const deviation = of(options.image_std, c);
      factor /= deviation;
      term = -of(options.image_mean, c) / deviation;
    }
    const values = Float32Array.from({ length: 256 }, (_, byte) => Math.fround(byte * Math.fround(factor)) +
      Math.fround(term));
    for (let i = 0; i < count; i++) found[c * count + i] = values[data[i * channels + c]];
  }
  return { data: found, dims: [channels, height, width] };
}
