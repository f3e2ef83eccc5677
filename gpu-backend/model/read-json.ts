/** Small JSON files beside the weights: bounded, and an object. */
import { readFile, stat } from 'node:fs/promises';
import { basename } from 'node:path';
import { corruptModel } from './model-errors.ts';

export type JsonObject = Readonly<Record<string, unknown>>;

/** `undefined` when there is no such file. @throws MaskrouteError `corrupt_model`. */
export async function readJsonFile(path: string, bytesMax: number): Promise<JsonObject | undefined> {
  const name = basename(path);
  const found = await stat(path).catch(() => undefined);
  if (found === undefined) return undefined;
  if (!found.isFile() || found.size > bytesMax) {
    throw corruptModel(`${name} is no file of at most ${bytesMax} bytes`);
  }
  let json: unknown;
  try {
    json = JSON.parse(await readFile(path, 'utf8'));
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
