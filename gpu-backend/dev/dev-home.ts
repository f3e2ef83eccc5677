/**
 * `$MASKROUTE_HOME/dev.json`: the addresses and keys of a running `npm start`. It exists exactly while the product is ready;
 * a file whose address does not answer is left from a killed run.
 */
import { randomBytes } from 'node:crypto';
import { rm } from 'node:fs/promises';
import path from 'node:path';
import { z } from 'zod';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { readOwnJson, tryLock, writePrivateJson } from '../files.ts';

const devFileSchema = z.object({
  edge: z.url(),
  backend: z.url(),
  apiKey: z.string().min(1),
  adminKey: z.string().min(1),
  backendKey: z.string().min(1),
  model: z.string().min(1),
});
export type DevFile = z.infer<typeof devFileSchema>;

export const devFilePath = (home: string): string => path.join(home, 'dev.json');

export const readDevFile = (home: string): Promise<DevFile | undefined> =>
  readOwnJson(devFilePath(home), devFileSchema);

export const writeDevFile = (home: string, dev: DevFile): Promise<void> =>
  writePrivateJson(devFilePath(home), dev);

export const removeDevFile = (home: string): Promise<void> => rm(devFilePath(home), { force: true });

/* The development keys: random, generated on the first start and stored in the home. */

const devKeysSchema = z.object({
  adminKey: z.string().min(32),
  backendKey: z.string().min(32),
  /** Created by the edge, which stores only its hash; undefined until then. */
  apiKey: z.string().min(1).optional(),
});
export type DevKeys = z.infer<typeof devKeysSchema>;

const keysPath = (home: string): string => path.join(home, 'dev-keys.json');
const randomKey = (prefix: string): string => `${prefix}_${randomBytes(24).toString('base64url')}`;

export async function loadOrCreateKeys(home: string): Promise<DevKeys> {
  const kept = await readOwnJson(keysPath(home), devKeysSchema);
  if (kept !== undefined) return kept;
  const keys = { adminKey: randomKey('mr_admin'), backendKey: randomKey('mr_backend') };
  await saveKeys(home, keys);
  return keys;
}

export const saveKeys = (home: string, keys: DevKeys): Promise<void> =>
  writePrivateJson(keysPath(home), keys);

/** Allows one running product for each home. @returns a function that releases it. @throws MaskrouteError `already_running`. */
export function lockHome(home: string): () => void {
  const unlock = tryLock(path.join(home, 'dev.lock'));
  if (unlock !== undefined) return unlock;
  throw new MaskrouteError(
    'already_running',
    `Maskroute is already running on ${home}. Stop it first, or set MASKROUTE_HOME to another folder.`,
  );
}
