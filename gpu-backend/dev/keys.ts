/** The development keys: drawn at random on the first start, kept in the home, the same on every later one. */
import { randomBytes } from 'node:crypto';
import path from 'node:path';
import { z } from 'zod';
import { readPrivateJson, writePrivateJson } from './private-file.ts';

const devKeysSchema = z.object({
  adminKey: z.string().min(32),
  backendKey: z.string().min(32),
  /** Made by the edge, which keeps only its hash; absent until then. */
  apiKey: z.string().min(1).optional(),
});
export type DevKeys = z.infer<typeof devKeysSchema>;

const keysPath = (home: string): string => path.join(home, 'dev-keys.json');
const randomKey = (prefix: string): string => `${prefix}_${randomBytes(24).toString('base64url')}`;

export async function loadOrCreateKeys(home: string): Promise<DevKeys> {
  const kept = await readPrivateJson(keysPath(home), devKeysSchema);
  if (kept !== undefined) return kept;
  const keys = { adminKey: randomKey('mr_admin'), backendKey: randomKey('mr_backend') };
  await saveKeys(home, keys);
  return keys;
}

export const saveKeys = (home: string, keys: DevKeys): Promise<void> =>
  writePrivateJson(keysPath(home), keys);
