/**
 * `$MASKROUTE_HOME/dev.json`: where a running `npm start` is and the keys to it. It exists exactly while
 * the product is ready; a file left by a killed run is told by nobody answering at its address.
 */
import { rm } from 'node:fs/promises';
import path from 'node:path';
import { z } from 'zod';
import { readPrivateJson, writePrivateJson } from './private-file.ts';

const devFileSchema = z.object({
  edge: z.url(),
  backend: z.url(),
  apiKey: z.string().min(1),
  adminKey: z.string().min(1),
  backendKey: z.string().min(1),
  model: z.string().min(1),
});
export type DevFile = z.infer<typeof devFileSchema>;

const devFilePath = (home: string): string => path.join(home, 'dev.json');

export const readDevFile = (home: string): Promise<DevFile | undefined> =>
  readPrivateJson(devFilePath(home), devFileSchema);

export const writeDevFile = (home: string, dev: DevFile): Promise<void> =>
  writePrivateJson(devFilePath(home), dev);

export const removeDevFile = (home: string): Promise<void> => rm(devFilePath(home), { force: true });
