/** The compared methods by the names that people type and read. */

/** Static baselines and the one learned mask: what `--baselines` chooses among. */
export const BASELINES = [
  'one-mask',
  'shortgpt',
  'sleb',
  'blockpruner',
  'finercut',
  'llm-drop',
  'last-k',
  'random',
] as const;
export type Baseline = (typeof BASELINES)[number];

export const METHODS = ['dense', 'learned', ...BASELINES] as const;
export type Method = (typeof METHODS)[number];

/** What a method's removals are counted in. */
export const UNITS_OF = {
  shortgpt: 'layers',
  sleb: 'layers',
  'last-k': 'layers',
  blockpruner: 'blocks',
  finercut: 'blocks',
  'llm-drop': 'blocks',
  random: 'blocks',
} as const satisfies Record<Exclude<Baseline, 'one-mask'>, 'layers' | 'blocks'>;
export type StaticMethod = keyof typeof UNITS_OF;

/** Baselines that evaluate the model for many masks. */
export const SEARCHED = ['sleb', 'blockpruner', 'finercut'] as const satisfies StaticMethod[];
/** Baselines that need text to calibrate on. */
export const CALIBRATED = [...SEARCHED, 'shortgpt', 'llm-drop'] as const satisfies StaticMethod[];

export const hasAny = (baselines: readonly Baseline[], some: readonly Baseline[]): boolean =>
  baselines.some((name) => some.includes(name));
