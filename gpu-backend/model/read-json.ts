/** Small files beside the weights: bounded, of their own folder, and JSON objects but for a chat template. */
import { basename, dirname } from 'node:path';
import { readRegular } from '../regular-file.ts';
import { corruptModel } from './model-errors.ts';

export type JsonObject = Readonly<Record<string, unknown>>;

/** `undefined` when there is no such file. @throws MaskrouteError `invalid_argument`, as `readRegular`. */
export async function readTextFile(path: string, bytesMax: number): Promise<string | undefined> {
  try {
    return (await readRegular(path, bytesMax, dirname(path))).toString('utf8');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw error;
  }
}

/** `undefined` when there is no such file. @throws MaskrouteError `corrupt_model`, `invalid_argument`. */
export async function readJsonFile(path: string, bytesMax: number): Promise<JsonObject | undefined> {
  const name = basename(path);
  const text = await readTextFile(path, bytesMax);
  if (text === undefined) return undefined;
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch (error) {
    throw corruptModel(`${name} is not JSON`, error);
  }
  if (json === null || typeof json !== 'object' || Array.isArray(json)) {
    throw corruptModel(`${name} is not a JSON object`);
  }
  return json as JsonObject;
}

/** @throws MaskrouteError `corrupt_model` when it is missing, too. */
export async function requireJsonFile(path: string, bytesMax: number): Promise<JsonObject> {
  const json = await readJsonFile(path, bytesMax);
  if (json === undefined) throw corruptModel(`its folder has no ${basename(path)}`);
  return json;
}
