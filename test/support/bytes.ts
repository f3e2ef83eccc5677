/** Little-endian bytes appended to a list, and the characters that stand for bytes in byte-level vocabularies. */

/** Every call gives the same object back, so that calls can be chained. */
type ByteAppender = {
  u32(value: number): ByteAppender;
  f32(value: number): ByteAppender;
  u64(value: number | bigint): ByteAppender;
  /** Length in 64 bits, then UTF-8. */
  text(value: string): ByteAppender;
};

export function appendBytes(out: number[]): ByteAppender {
  const scratch = new DataView(new ArrayBuffer(8));
  const flush = (bytes: number) => {
    for (let i = 0; i < bytes; i++) out.push(scratch.getUint8(i));
    return appender;
  };
  const appender: ByteAppender = {
    u32(value) {
      scratch.setUint32(0, value, true);
      return flush(4);
    },
    f32(value) {
      scratch.setFloat32(0, value, true);
      return flush(4);
    },
    u64(value) {
      scratch.setBigUint64(0, BigInt.asUintN(64, BigInt(value)), true);
      return flush(8);
    },
    text(value) {
      const bytes = new TextEncoder().encode(value);
      appender.u64(bytes.length);
      for (const byte of bytes) out.push(byte);
      return appender;
    },
  };
  return appender;
}

/** Index = byte. Printable Latin-1 stands for itself, the rest counts up from U+0100 (GPT-2's encoder.py). */
export const BYTE_CHARACTERS: readonly string[] = (() => {
  let next = 256;
  return Array.from({ length: 256 }, (_, byte) => {
    const itself = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    return String.fromCharCode(itself ? byte : next++);
  });
})();
