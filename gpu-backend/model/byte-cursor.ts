/**
 * Reads a file's header forwards through a sliding window, so that a header of any claimed size costs one
 * window of memory. Every read is checked against the end of the file first: a length that lies fails here,
 * before anything is allocated for it.
 */
import { readSync } from 'node:fs';
import { corruptModel } from './model-errors.ts';

const WINDOW_BYTES = 1024 * 1024;
/** No string in a real header is longer: chat templates reach some tens of kilobytes. */
export const STRING_BYTES_MAX = WINDOW_BYTES;

export class ByteCursor {
  readonly #fd: number;
  readonly #limit: number;
  readonly #window = Buffer.allocUnsafe(WINDOW_BYTES + 16);
  readonly #view = new DataView(this.#window.buffer, this.#window.byteOffset, this.#window.byteLength);
  /** Without a byte-order mark being dropped: it can be a token. */
  readonly #decoder = new TextDecoder('utf-8', { ignoreBOM: true });
  #windowStart = 0;
  #windowEnd = 0;
  #position = 0;

  /** `limit`: the first byte that may not be read, at most the file's size. */
  constructor(fd: number, limit: number) {
    this.#fd = fd;
    this.#limit = limit;
  }

  get position(): number {
    return this.#position;
  }

  get remaining(): number {
    return this.#limit - this.#position;
  }

  u8(): number {
    return this.#view.getUint8(this.#take(1));
  }
  i8(): number {
    return this.#view.getInt8(this.#take(1));
  }
  u16(): number {
    return this.#view.getUint16(this.#take(2), true);
  }
  i16(): number {
    return this.#view.getInt16(this.#take(2), true);
  }
  u32(): number {
    return this.#view.getUint32(this.#take(4), true);
  }
  i32(): number {
    return this.#view.getInt32(this.#take(4), true);
  }
  f32(): number {
    return this.#view.getFloat32(this.#take(4), true);
  }
  f64(): number {
    return this.#view.getFloat64(this.#take(8), true);
  }
  u64(): bigint {
    return this.#view.getBigUint64(this.#take(8), true);
  }
  i64(): bigint {
    return this.#view.getBigInt64(this.#take(8), true);
  }

  /** A 64-bit count or size that must not exceed `max`. */
  size(what: string, max: number): number {
    const value = this.u64();
    const bound = Math.floor(max);
    if (value > BigInt(bound)) throw corruptModel(`${what} is ${value}, more than ${bound}`);
    return Number(value);
  }

  string(what: string, max: number = STRING_BYTES_MAX): string {
    const bytes = this.size(`the length of ${what}`, Math.min(max, STRING_BYTES_MAX));
    const start = this.#take(bytes);
    return this.#decoder.decode(this.#window.subarray(start, start + bytes));
  }

  /** Moves over `bytes` and gives where they start in the window. */
  #take(bytes: number): number {
    if (bytes > this.remaining) {
      throw corruptModel(`it ends inside its header (byte ${this.#limit}, ${bytes} more are announced)`);
    }
    if (this.#position + bytes > this.#windowEnd) this.#fill(bytes);
    const start = this.#position - this.#windowStart;
    this.#position += bytes;
    return start;
  }

  #fill(bytes: number): void {
    this.#windowStart = this.#position;
    this.#windowEnd = this.#position;
    const wanted = Math.min(WINDOW_BYTES, this.remaining);
    while (this.#windowEnd - this.#windowStart < wanted) {
      const at = this.#windowEnd - this.#windowStart;
      const read = readSync(this.#fd, this.#window, at, wanted - at, this.#windowEnd);
      if (read === 0) break;
      this.#windowEnd += read;
    }
    if (this.#windowEnd - this.#windowStart < bytes)
      throw corruptModel('it became shorter while it was read');
  }
}
