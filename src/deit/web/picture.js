// Decodes an image file to its pixels: upright, with the values that the file holds. A pixel is four bytes: red, green,
// blue, alpha.

import { said } from "./words.js";

const MAX_PIXELS = 178956970;  // as in deit's own decoding
const STRIP = 2 ** 22;  // pixels that go through a canvas at once, because browsers limit its size

// Throws an Error with a sentence for the reader of the page.
export async function decoded(file) {
  let image;
  try {
    image = await createImageBitmap(file, { imageOrientation: "from-image", colorSpaceConversion: "none",
      premultiplyAlpha: "none" });
  } catch {
    throw new Error(said("This browser can\u2019t read that as an image. Choose a JPEG, PNG or WebP file."));
  }
  try {
    const { height, width } = image;
    if (height * width > MAX_PIXELS) {
      throw new Error(said("The image has {width} \u00d7 {height} pixels, more than {most} in all. Choose a smaller one.",
        { width, height, most: MAX_PIXELS }));
    }
    const data = drawn(image);
    return { data: hasAlpha(data) ? unblended(image) ?? data : data, height, width };
  } finally {
    image.close();
  }
}

function drawn(image) {
  const { height, width } = image;
  const rows = Math.min(height, Math.max(1, Math.floor(STRIP / width)));
  const canvas = new OffscreenCanvas(width, rows);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const found = new Uint8Array(4 * height * width);
  for (let top = 0; top < height; top += rows) {
    const count = Math.min(rows, height - top);
    context.clearRect(0, 0, width, rows);
    context.drawImage(image, 0, top, width, count, 0, 0, width, count);
    found.set(context.getImageData(0, 0, width, count).data, 4 * top * width);
  }
  return found;
}

function hasAlpha(data) {
  for (let i = 3; i < data.length; i += 4) if (data[i] < 255) return true;
  return false;
}

// A canvas multiplies colours by alpha, so it loses the colours of transparent pixels; a texture keeps them. Returns
// null if the browser has no WebGL, or if the image is too large for it.
function unblended(image) {
  const { height, width } = image;
  const gl = new OffscreenCanvas(1, 1).getContext("webgl");
  if (!gl || Math.max(height, width) > gl.getParameter(gl.MAX_TEXTURE_SIZE)) return null;
  const texture = gl.createTexture();
  gl.bindTexture(gl.TEXTURE_2D, texture);
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, image);
  gl.bindFramebuffer(gl.FRAMEBUFFER, gl.createFramebuffer());
  gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, texture, 0);
  const found = new Uint8Array(4 * height * width);
  gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, found);
  const failed = gl.getError() !== gl.NO_ERROR;
  gl.getExtension("WEBGL_lose_context")?.loseContext();  // browsers allow few contexts
  return failed ? null : found;
}
