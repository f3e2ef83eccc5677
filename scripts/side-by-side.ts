/** Two texts in two columns, wrapped at words. Widths are counted in characters, so wide scripts lean a little. */

const GAP = '  │  ';

/** Lines of at most `width` characters, indented as their paragraph is; a longer word is cut. */
export function wrap(text: string, width: number): string[] {
  return text.split('\n').flatMap((paragraph) => {
    const indent = paragraph.match(/^ */)![0].slice(0, width / 2);
    const lines: string[] = [];
    let line = '';
    for (const word of paragraph
      .trim()
      .split(/ +/)
      .flatMap((word) => cut(word, width - indent.length))) {
      if (line !== '' && indent.length + line.length + 1 + word.length > width) {
        lines.push(indent + line);
        line = word;
      } else line = line === '' ? word : `${line} ${word}`;
    }
    return [...lines, line === '' ? '' : indent + line];
  });
}

function cut(word: string, width: number): string[] {
  const characters = [...word];
  const parts: string[] = [];
  for (let start = 0; start === 0 || start < characters.length; start += width) {
    parts.push(characters.slice(start, start + width).join(''));
  }
  return parts;
}

export function sideBySide(left: string, right: string, columns: number): string[] {
  const width = Math.max(10, Math.floor((columns - GAP.length) / 2));
  const [leftLines, rightLines] = [wrap(left, width), wrap(right, width)];
  return Array.from({ length: Math.max(leftLines.length, rightLines.length) }, (_, row) =>
    `${(leftLines[row] ?? '').padEnd(width)}${GAP}${rightLines[row] ?? ''}`.trimEnd(),
  );
}
