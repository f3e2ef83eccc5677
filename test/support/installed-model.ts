/** The real default model, which `npm test` installs first. */
import { maskrouteHome } from '../../gpu-backend/files.ts';
import { DEFAULT_MODEL, defaultModelFile } from '../../gpu-backend/model/sources/resolve.ts';
import { openInstalled } from '../../gpu-backend/model/store.ts';

export const testHome = maskrouteHome();
/** The GGUF file that it was made from, when it came from there. */
export const testModelFile = defaultModelFile(testHome);
export const installedModel = () => openInstalled(testHome, DEFAULT_MODEL);
