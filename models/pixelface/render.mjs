// stdin: one JSON object of DiceBear options a line; stdout: 32*32 RGB bytes for each, in order.
import { createAvatar } from '@dicebear/core';
import * as pixelArt from '@dicebear/pixel-art';
import { Resvg } from '@resvg/resvg-js';
import readline from 'node:readline';

const SIZE = 32;
for await (const line of readline.createInterface({ input: process.stdin })) {
  // The style fades a beard by the brightness of its own colour, so that black beards vanish; by alpha, all show.
  // As an attribute: resvg does not read mask-type where it stands in style.
  const svg = createAvatar(pixelArt, { size: SIZE, seed: '', ...JSON.parse(line) })
    .toString()
    .replaceAll('style="mask-type:luminance"', 'mask-type="alpha"');
  const rgba = new Resvg(svg).render().pixels;
  const rgb = Buffer.alloc(SIZE * SIZE * 3);
  for (let i = 0; i < SIZE * SIZE; i++) rgba.copy(rgb, i * 3, i * 4, i * 4 + 3);
  if (!process.stdout.write(rgb)) await new Promise((resume) => process.stdout.once('drain', resume));
}
