/**
 * A GPU for the tests: Mesa's lavapipe, which computes on the processor. Run by itself (before `npm test`) this
 * installs Debian's package where it is missing and that is possible.
 */
import { existsSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { installWithApt } from './apt.ts';

const FOLDERS = ['/usr/share/vulkan/icd.d', '/usr/local/share/vulkan/icd.d', '/etc/vulkan/icd.d'];

/** The file by which Vulkan's loader finds lavapipe; undefined when there is none. */
export function findLavapipe(): string | undefined {
  const files = FOLDERS.filter(existsSync).flatMap((folder) =>
    readdirSync(folder).map((name) => join(folder, name)),
  );
  return files.find((file) => /\/lvp_icd\.[^/]*json$/.test(file));
}

export const NO_LAVAPIPE =
  'There is no lavapipe for the tests of GPUs. Install it (Debian: apt-get install mesa-vulkan-drivers).';

/** From now on, this process and its children see lavapipe and no other device of Vulkan. @throws Error without it. */
export function useLavapipe(): void {
  const file = findLavapipe();
  if (file === undefined) throw new Error(NO_LAVAPIPE);
  process.env.VK_DRIVER_FILES = file;
}

if (import.meta.main && process.platform === 'linux') {
  if (
    findLavapipe() === undefined &&
    !(installWithApt('mesa-vulkan-drivers', 'libvulkan1') && findLavapipe())
  ) {
    console.error(NO_LAVAPIPE);
    process.exit(1);
  }
}
