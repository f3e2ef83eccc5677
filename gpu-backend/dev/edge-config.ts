/**
 * What wrangler.toml says about the edge, as far as one machine can give it. A binding that is not known here
 * stops the start, so that the local edge never runs with less than the deployed one in silence.
 */
import { readFile } from 'node:fs/promises';
import path from 'node:path';
import { parse } from 'smol-toml';
import { z } from 'zod';
import { MaskrouteError } from '../../shared/errors.ts';

const wranglerSchema = z.strictObject({
  name: z.string(),
  main: z.string(),
  compatibility_date: z.string(),
  compatibility_flags: z.array(z.string()).default([]),
  assets: z.strictObject({ directory: z.string(), binding: z.string(), run_worker_first: z.literal(true) }),
  d1_databases: z
    .array(
      z.strictObject({
        binding: z.string(),
        database_name: z.string(),
        database_id: z.string(),
        migrations_dir: z.string(),
      }),
    )
    .length(1),
  vars: z.record(z.string(), z.string()).default({}),
  observability: z.unknown(),
  env: z.unknown(),
});

export type EdgeConfig = {
  readonly name: string;
  /** Absolute, as are the folders. */
  readonly entry: string;
  readonly compatibilityDate: string;
  readonly compatibilityFlags: string[];
  readonly assets: { readonly folder: string; readonly binding: string };
  readonly database: { readonly binding: string; readonly name: string; readonly migrationsFolder: string };
  readonly vars: Record<string, string>;
};

/** @throws MaskrouteError `start_failed` naming the entry that is wrong or not known here. */
export async function readEdgeConfig(projectFolder: string): Promise<EdgeConfig> {
  const file = path.join(projectFolder, 'wrangler.toml');
  const parsed = wranglerSchema.safeParse(parse(await readFile(file, 'utf8')));
  if (!parsed.success) {
    throw new MaskrouteError('start_failed', `wrangler.toml: ${z.prettifyError(parsed.error)}`);
  }
  const { data } = parsed;
  const [database] = data.d1_databases;
  const inProject = (relative: string) => path.resolve(projectFolder, relative);
  return {
    name: data.name,
    entry: inProject(data.main),
    compatibilityDate: data.compatibility_date,
    compatibilityFlags: data.compatibility_flags,
    assets: { folder: inProject(data.assets.directory), binding: data.assets.binding },
    database: {
      binding: database!.binding,
      name: database!.database_name,
      migrationsFolder: inProject(database!.migrations_dir),
    },
    vars: data.vars,
  };
}
