/** Pipes, devices and links that lead nowhere are refused when they are named as files; folders and locks. */
import { execFileSync } from 'node:child_process';
import { mkdir, mkdtemp, readdir, rm, stat, symlink, writeFile } from 'node:fs/promises';
import { createServer, type Server } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { DatabaseSync } from 'node:sqlite';
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import {
  createWhole,
  makeFolder,
  makeOutFolder,
  tryLock,
  withLock,
  writeWhole,
} from '../../gpu-backend/files.ts';
import { JobData } from '../../gpu-backend/jobs/job-data.ts';
import { openEncoder } from '../../gpu-backend/learning/data/encoders.ts';
import { readData } from '../../gpu-backend/learning/data/read-data.ts';
import { readTask } from '../../gpu-backend/learning/evaluation/tasks/read-task.ts';
import { openGguf } from '../../gpu-backend/model/formats/gguf.ts';
import { openSafetensorsFolder } from '../../gpu-backend/model/formats/hf-folder.ts';
import { parseModelSpec } from '../../gpu-backend/model/sources/resolve.ts';
import { sha256OfFiles } from '../../gpu-backend/model/store.ts';
import { tokenizerFromFolder } from '../../gpu-backend/model/tokenizer/hf-tokenizer.ts';
import { readEvaluation, readMaskSet } from '../../gpu-backend/publication/publish.ts';
import { tinyFolder } from '../support/safetensors.ts';

let folder: string;
let server: Server | undefined;
beforeEach(async () => {
  folder = await mkdtemp(path.join(tmpdir(), 'maskroute-irregular-'));
});
afterEach(async () => {
  server?.close();
  server = undefined;
  await rm(folder, { recursive: true });
});

async function writeTiny(target: string): Promise<void> {
  for (const [name, bytes] of Object.entries(await tinyFolder()))
    await writeFile(path.join(target, name), bytes);
}

/** What may lie under a file's name, and what people are told of it. */
const KINDS: Record<string, { make(file: string): Promise<unknown>; said: RegExp }> = {
  pipe: { make: async (file) => execFileSync('mkfifo', [file]), said: /is a named pipe, not a regular file/ },
  device: {
    make: (file) => symlink('/dev/zero', file),
    said: /is a device, not a regular file|leads out of/,
  },
  folder: { make: (file) => mkdir(file), said: /is a folder, not a regular file/ },
  circle: { make: (file) => symlink(path.basename(file), file), said: /is a link that leads in a circle/ },
  'link to nothing': {
    make: (file) => symlink('nothing', file),
    said: /is a link to a file that is not there/,
  },
  socket: {
    make: (file) =>
      new Promise<void>((resolve) => {
        server = createServer().listen(file, resolve);
      }),
    said: /is a socket, not a regular file/,
  },
};

/** Everything that reads a file that somebody named. */
const READERS: Record<string, (file: string) => Promise<unknown>> = {
  '--data': (file) => readData([file]),
  'the content of --data': (file) => sha256OfFiles([file]),
  'a task': (file) => readTask({ task: 'arc_easy', path: file }, 1),
  'a mask set': readMaskSet,
  'an evaluation': readEvaluation,
  'a GGUF file': openGguf,
  'a table of an encoder': (file) =>
    openEncoder(file, { home: folder, threads: 1, hooks: { onProgress: () => {}, log: () => {} } }),
};

describe.each(Object.entries(KINDS))('a %s', (_kind, { make, said }) => {
  test.each(Object.entries(READERS))('is refused as %s', async (_reader, read) => {
    const file = path.join(folder, 'named.bin');
    await make(file);
    const error = await read(file).catch((thrown: unknown) => thrown);
    expect(error).toMatchObject({ name: 'MaskrouteError', message: expect.stringMatching(said) });
    expect((error as Error).message).toContain('named.bin');
  });

  test.each([
    'config.json',
    'model.safetensors',
    'model.safetensors.index.json',
    'tokenizer.json',
    'tokenizer_config.json',
    'generation_config.json',
    'chat_template.jinja',
  ])('is refused as %s of a model', async (name) => {
    await writeTiny(folder);
    await rm(path.join(folder, name), { force: true });
    // Where there is one file, no index is read.
    if (name.endsWith('.index.json')) await rm(path.join(folder, 'model.safetensors'));
    await make(path.join(folder, name));
    const read = async () => {
      await (await openSafetensorsFolder(folder)).close();
      await tokenizerFromFolder(folder, 265);
    };
    const error = await read().catch((thrown: unknown) => thrown);
    expect(error).toMatchObject({ name: 'MaskrouteError', message: expect.stringMatching(said) });
    expect((error as Error).message).toContain(name);
  });

  test('is refused as data of a job', async () => {
    await make(path.join(folder, 'named.jsonl'));
    const data = new JobData(path.join(folder, 'uploads'), folder);
    await expect(data.files({ data: [{ path: 'named.jsonl' }] })).rejects.toMatchObject({
      name: 'MaskrouteError',
      param: 'data',
    });
  });
});

test('a pipe is no model', async () => {
  const file = path.join(folder, 'model.gguf');
  execFileSync('mkfifo', [file]);
  await expect(parseModelSpec(file)).rejects.toMatchObject({
    code: 'invalid_request',
    message: expect.stringContaining('is a named pipe'),
  });
});

describe('a link', () => {
  const tokenizer = () => tokenizerFromFolder(path.join(folder, 'model'), 265);
  const secret = () => path.join(folder, 'secret.txt');

  test('out of the folder of a model is refused: its target would become part of the model', async () => {
    await mkdir(path.join(folder, 'model'));
    await writeTiny(path.join(folder, 'model'));
    await writeFile(secret(), 'a secret');
    await symlink(secret(), path.join(folder, 'model', 'chat_template.jinja'));
    await expect(tokenizer()).rejects.toMatchObject({
      message: expect.stringMatching(/chat_template\.jinja is a link that leads out of its folder/),
    });
  });

  test('inside of it is followed, and so is one of the hub’s cache', async () => {
    await mkdir(path.join(folder, 'model'));
    await writeTiny(path.join(folder, 'model'));
    await writeFile(path.join(folder, 'model', 'template.txt'), 'inside');
    await symlink('template.txt', path.join(folder, 'model', 'chat_template.jinja'));
    expect((await tokenizer()).chatTemplate).toBe('inside');

    const repository = path.join(folder, 'models--acme--tiny');
    const snapshot = path.join(repository, 'snapshots', 'a'.repeat(40));
    await mkdir(snapshot, { recursive: true });
    await mkdir(path.join(repository, 'blobs'));
    await writeTiny(snapshot);
    await writeFile(path.join(repository, 'blobs', 'b1'), 'from the cache');
    await symlink('../../blobs/b1', path.join(snapshot, 'chat_template.jinja'));
    expect((await tokenizerFromFolder(snapshot, 265)).chatTemplate).toBe('from the cache');
  });

  test('that somebody names themselves may lead anywhere', async () => {
    await writeFile(secret(), '{"text": "some words"}\n');
    await symlink(secret(), path.join(folder, 'data.jsonl'));
    expect(await readData([path.join(folder, 'data.jsonl')])).toHaveLength(1);
  });
});

describe('a folder', () => {
  const made = () => path.join(folder, 'a', 'b');

  test('is made with those above it, also where it is already', async () => {
    for (let i = 0; i < 2; i++) await makeFolder(made(), 0o700);
    expect((await stat(made())).mode & 0o777).toBe(0o700);
  });

  test('is made by several at once', async () => {
    const deep = (i: number) => path.join(folder, String(i % 99), ...'abcd'.slice(0, 1 + (i % 4)));
    await Promise.all(Array.from({ length: 800 }, (_, i) => makeFolder(deep(i))));
  });

  test.each([
    ['a file is', () => path.join(folder, 'file'), 'EEXIST'],
    ['a file is above it', () => path.join(folder, 'file', 'a', 'b'), 'EEXIST'],
    ['the system makes none', () => '/proc/maskroute/models', 'ENOENT'],
  ])('cannot be made where %s', async (_, where, reason) => {
    await writeFile(path.join(folder, 'file'), '');
    await expect(makeFolder(where())).rejects.toMatchObject({
      code: 'storage_failed',
      message: expect.stringMatching(`cannot be made: ${reason}`),
    });
  });
});

test.runIf(process.platform === 'linux')(
  'a folder that takes no files is found out before the work',
  async () => {
    await makeOutFolder(folder);
    expect(await readdir(folder)).toEqual([]);
    await expect(makeOutFolder('/proc')).rejects.toMatchObject({
      code: 'storage_failed',
      message: expect.stringMatching(/^Nothing can be written to \/proc: ENOENT/),
    });
    // The longest path that there is: not even whether its files exist can be asked.
    const deep = path.join(folder, 'x/'.repeat((4094 - folder.length) / 2));
    await expect(makeOutFolder(deep)).rejects.toMatchObject({
      code: 'storage_failed',
      message: expect.stringMatching(/^Nothing can be written to .*: ENAMETOOLONG/),
    });
  },
);

test.each([writeWhole, createWhole])(
  '%o tells why a file is not written, not why its part stays',
  async (write) => {
    await writeFile(path.join(folder, 'file'), '');
    await expect(write(path.join(folder, 'file', 'a'), '')).rejects.toMatchObject({ syscall: 'open' });
  },
);

describe('a lock', () => {
  const file = () => path.join(folder, '.lock');

  test('is held once, until it is released', async () => {
    const unlock = tryLock(file())!;
    expect(tryLock(file())).toBeUndefined();
    unlock();
    unlock();
    tryLock(file())!();
    expect(await readdir(folder)).toEqual(['.lock']);
  });

  test.each([
    // What SQLite makes of ENOLCK, as NFS without a lock service answers, and of ENOSYS.
    ['is busy', 5],
    ['has an error of its locks', 3850],
  ])(
    'on a file system without locks is refused, not waited for: SQLite says that it %s',
    async (_, errcode) => {
      vi.spyOn(DatabaseSync.prototype, 'exec').mockImplementation(() => {
        throw Object.assign(new Error('database is locked'), { errcode });
      });
      const refused = {
        code: 'start_failed',
        message: expect.stringContaining('its file system has no locks'),
      };
      try {
        expect(() => tryLock(file())).toThrow(expect.objectContaining(refused));
        const waits = withLock(file(), { onWait: () => expect.unreachable() }, async () => {});
        await expect(waits).rejects.toMatchObject(refused);
      } finally {
        vi.restoreAllMocks();
      }
      expect(await readdir(folder)).toEqual(['.lock']);
    },
  );
});
