/**
 * What is deployed fits together: Kubernetes' own schemas take every manifest, names that refer to each other meet,
 * what manifests ask of a backend is there, and its image holds what a backend imports.
 */
import { existsSync, globSync, readdirSync, readFileSync } from 'node:fs';
import path from 'node:path';
import { parse as parseToml } from 'smol-toml';
import { describe, expect, test } from 'vitest';
import { parseAllDocuments } from 'yaml';
import { DEFAULT_LIMITS } from '../gpu-backend/api/parts.ts';
import { tokenBytes } from '../gpu-backend/engine/kv-cache.ts';
import { PREFIX_TOKENS_MAX } from '../gpu-backend/engine/prefix-cache.ts';
import { QUEUE_NAME } from '../gpu-backend/learning/units/unit-queue.ts';
import { readImports } from '../scripts/import-rules.ts';
import { METRICS_KEY, serveModel } from './gpu-backend/api/harness.ts';
import { bytesOf, scriptedEngine, scriptedModel } from './gpu-backend/api/scripted-engine.ts';
import { saidInProcess } from './gpu-backend/cli/in-process.ts';

type Manifest = {
  apiVersion: string;
  kind: string;
  metadata: { name: string; labels?: Record<string, string> };
  // biome-ignore lint/suspicious/noExplicitAny: its shape is what Kubernetes' schema has just said of it
  spec: any;
};

const FOLDER = 'deploy/kubernetes';
const KUSTOMIZATION = 'kustomization.yaml';

function readYaml(file: string, folder = FOLDER): Manifest[] {
  return parseAllDocuments(readFileSync(path.join(folder, file), 'utf8'), { strict: true }).map(
    (document) => {
      expect(document.errors, file).toEqual([]);
      return document.toJS();
    },
  );
}

/** The block of YAML in the guide that begins with this key. */
function guideYaml(key: string) {
  const blocks = readFileSync('docs/deploy.md', 'utf8').matchAll(/^ *```yaml\n(.*?)^ *```/gms);
  const [, block] = [...blocks].find(([, text]) => text!.trimStart().startsWith(`${key}:`))!;
  return parseAllDocuments(block!, { strict: true })[0]!.toJS();
}

/** What a command says of its options and of what it reads from the environment. */
const helpOf = async (command: string): Promise<string> =>
  (await saidInProcess({}, [command, '--help'])).stdout;

const manifestsIn = (folder: string): string[] =>
  readdirSync(folder).filter((name) => name.endsWith('.yaml') && name !== KUSTOMIZATION);
const files = manifestsIn(FOLDER);
const manifests = files.flatMap((file) => readYaml(file));
const find = (kind: string, name = 'backend'): Manifest =>
  manifests.find((manifest) => manifest.kind === kind && manifest.metadata.name === name)!;
const backend = find('StatefulSet');
const pod = backend.spec.template.spec;
const container = pod.containers[0];

describe('the Kubernetes manifests', () => {
  test.each(manifests.map((manifest) => [`${manifest.kind} ${manifest.metadata.name}`, manifest] as const))(
    '%s is what its schema says',
    async (_name, manifest) => {
      await validate(manifest);
    },
  );

  test('a manifest that is wrong is refused', async () => {
    const wrong = structuredClone(backend);
    wrong.spec.template.spec.containers[0].livenessProbe.httpGet.port = { http: true };
    await expect(validate(wrong)).rejects.toThrow(/port/);
    const unfinished = structuredClone(find('HorizontalPodAutoscaler'));
    delete unfinished.spec.maxReplicas;
    await expect(validate(unfinished)).rejects.toThrow(/maxReplicas/);
  });

  test('a backend on a GPU is the same backend, with a card', async () => {
    const folder = '../kubernetes-gpu';
    const [kustomization] = readYaml(`${folder}/${KUSTOMIZATION}`) as unknown as [
      { resources: string[]; patches: { path: string }[]; images: { name: string }[] },
    ];
    expect(kustomization.resources.map((name) => path.join(FOLDER, folder, name))).toEqual([FOLDER]);
    expect(kustomization.images.map(({ name }) => name)).toEqual([container.image]);
    const [patch] = kustomization.patches.flatMap((one) => readYaml(`${folder}/${one.path}`));
    const { containers, tolerations } = patch!.spec.template.spec;
    expect([patch!.kind, patch!.metadata.name, containers[0].name]).toEqual([
      ...[backend.kind, backend.metadata.name, container.name],
    ]);
    const patched = structuredClone(backend);
    const own = patched.spec.template.spec;
    Object.assign(own, { tolerations });
    const { env } = containers[0];
    // Kustomize merges variables by name.
    own.containers[0].env = own.containers[0].env
      .filter(({ name }: { name: string }) => !env.some((one: { name: string }) => one.name === name))
      .concat(env);
    Object.assign(own.containers[0].resources.limits, containers[0].resources.limits);
    await validate(patched);
    const names = own.containers[0].env.map(({ name }: { name: string }) => name);
    expect(new Set(names).size).toBe(names.length);
    expect(own.containers[0].resources.limits['nvidia.com/gpu']).toBe(1);
    expect(await helpOf('serve')).toContain('MASKROUTE_DEVICE');
    expect(readFileSync('deploy/Containerfile', 'utf8')).toContain('ENV MASKROUTE_DEVICE=$DEVICE');
  });

  test('the kustomization names all of them', () => {
    const [kustomization] = readYaml(KUSTOMIZATION) as unknown as [
      { resources: string[]; images: { name: string }[] },
    ];
    expect(kustomization.resources.toSorted()).toEqual(files.toSorted());
    expect(kustomization.images.map(({ name }) => name)).toContain(container.image);
  });

  test('what refers to the backend finds it', () => {
    const labels = backend.spec.template.metadata.labels;
    for (const selector of [
      backend.spec.selector.matchLabels,
      find('Service').spec.selector,
      find('PodDisruptionBudget').spec.selector.matchLabels,
      find('NetworkPolicy').spec.podSelector.matchLabels,
    ]) {
      expect(labels).toMatchObject(selector);
    }
    expect(backend.spec.serviceName).toBe(find('Service').metadata.name);
    const [fromTunnel, fromRegistrar] = find('NetworkPolicy').spec.ingress[0].from;
    expect(find('Deployment', 'tunnel').spec.template.metadata.labels).toMatchObject(
      fromTunnel.podSelector.matchLabels,
    );
    expect(find('Deployment', 'registrar').spec.template.metadata.labels).toMatchObject(
      fromRegistrar.podSelector.matchLabels,
    );
    expect(find('HorizontalPodAutoscaler').spec.scaleTargetRef).toMatchObject({
      kind: backend.kind,
      apiVersion: backend.apiVersion,
      name: backend.metadata.name,
    });
    const claim = pod.volumes.find(
      (volume: { name: string }) => volume.name === 'models',
    ).persistentVolumeClaim;
    expect(find('PersistentVolumeClaim', claim.claimName)).toBeDefined();
    const volumes = pod.volumes.map((volume: { name: string }) => volume.name);
    for (const { volumeMounts } of [...pod.containers, ...pod.initContainers]) {
      expect(volumes).toEqual(
        expect.arrayContaining(volumeMounts.map((mount: { name: string }) => mount.name)),
      );
    }
  });

  test('ask of a backend what it has', async () => {
    const model = scriptedModel(scriptedEngine({ answer: () => bytesOf('a story') }));
    await using server = await serveModel(model, {}, { metricsKey: METRICS_KEY });
    for (const probe of ['startupProbe', 'livenessProbe', 'readinessProbe']) {
      expect(container[probe].httpGet.port).toBe(container.ports[0].name);
      expect((await fetch(server.url + container[probe].httpGet.path)).status).toBe(200);
    }
    // Figures want a key: the backend has one for them alone, and the guide's job of Prometheus sends it.
    const metricsKey = container.env.find(({ name }: { name: string }) => name === 'MASKROUTE_METRICS_KEY');
    expect(metricsKey.valueFrom.secretKeyRef.key).toBe('metrics-key');
    expect(backend.spec.template.metadata.annotations ?? {}).not.toHaveProperty('prometheus.io/scrape');
    const job = guideYaml('scrape_configs').scrape_configs[0];
    expect(job.authorization.credentials_file).toContain('metrics-key');
    const kept = job.relabel_configs.filter(({ action }: { action?: string }) => action === 'keep');
    expect(kept.map(({ regex }: { regex: string }) => regex)).toEqual([
      backend.spec.template.metadata.labels['app.kubernetes.io/name'],
      container.ports[0].name,
    ]);
    expect(job.kubernetes_sd_configs[0].namespaces.names).toEqual([
      find('Namespace', 'maskroute').metadata.name,
    ]);
    const { metric } = find('HorizontalPodAutoscaler').spec.metrics[0].pods;
    const headers = { authorization: `Bearer ${METRICS_KEY}` };
    const figures = await (await fetch(`${server.url}/metrics`, { headers })).text();
    expect(figures).toContain(`# TYPE ${metric.name} gauge`);
    const serve = await helpOf('serve');
    const names = (container.env as { name: string; value?: string }[]).map(({ name, value = '' }, i) => {
      // Kubernetes puts in what was named before.
      for (const [, used] of value.matchAll(/\$\((\w+)\)/g))
        expect(container.env.slice(0, i)).toContainEqual(expect.objectContaining({ name: used }));
      return name;
    });
    const put = (container.env as { value?: string }[]).map(({ value }) => value).join(' ');
    for (const name of names.filter((one) => !put.includes(`$(${one})`))) expect(serve).toContain(name);
  });

  test('give a backend the threads that it asks for, and memory for all keys and values', () => {
    const variable = (name: string) => container.env.find((one: { name: string }) => one.name === name);
    expect(variable('MASKROUTE_THREADS').valueFrom.resourceFieldRef).toEqual({
      containerName: container.name,
      resource: 'requests.cpu',
    });
    const tokens = Number(variable('MASKROUTE_CACHE_TOKENS').value) + PREFIX_TOKENS_MAX;
    const keysAndValues_bytes = tokens * tokenBytes({ layerCount: 30, width: 3 * 64, kvType: 'f32' });
    const [, limit_gib] = /^(\d+)Gi$/.exec(container.resources.limits.memory)!;
    // An idle backend takes 0.6 GiB; the rest is for forms, embeddings and jobs.
    expect(Number(limit_gib) * 2 ** 30).toBeGreaterThan(keysAndValues_bytes + 1.4 * 2 ** 30);
  });

  test('register as many backends as the autoscaler may start, under their addresses', async () => {
    const { args, env: named } = find('Deployment', 'registrar').spec.template.spec.containers[0];
    const [{ value }] = container.env.filter(
      ({ name }: { name: string }) => name === 'MASKROUTE_BACKEND_URL',
    );
    const { name } = backend.metadata;
    expect(args).toContain(`--count=${find('HorizontalPodAutoscaler').spec.maxReplicas}`);
    expect(args).toContain(`--url=${value.replace('$(POD_NAME)', `${name}-{n}`)}`);
    const { port } = find('Service').spec.ports[0];
    expect(args).toContain(`--probe=http://${name}-{n}.${find('Service').metadata.name}:${port}`);
    for (const [, used] of args.join(' ').matchAll(/\$\((\w+)\)/g))
      expect(named).toContainEqual(expect.objectContaining({ name: used }));
    const help = await helpOf('register');
    for (const [option] of args.join(' ').matchAll(/--[a-z]+/g)) expect(help).toContain(`  ${option} <`);
  });

  test('give each backend an address, and time to finish what runs', () => {
    const service = find('Service').spec;
    expect([service.clusterIP, service.publishNotReadyAddresses]).toEqual(['None', true]);
    const url = container.env.find(({ name }: { name: string }) => name === 'MASKROUTE_BACKEND_URL');
    expect(url.value).toContain('$(POD_NAME)');
    const [command, sleep_s] = container.lifecycle.preStop.exec.command;
    expect(command).toBe('sleep');
    const stop_s = (DEFAULT_LIMITS.drain_ms + DEFAULT_LIMITS.ending_ms) / 1000;
    expect(pod.terminationGracePeriodSeconds).toBeGreaterThan(Number(sleep_s) + stop_s + 10);
  });

  test('name no secret that the guide does not make, and hold none', () => {
    const guide = readFileSync('docs/deploy.md', 'utf8');
    const text = files.map((file) => readFileSync(path.join(FOLDER, file), 'utf8')).join('\n');
    for (const [, name, key] of text.matchAll(/secretKeyRef:\s+name: (\S+)\s+key: (\S+)/g)) {
      expect(guide).toMatch(new RegExp(`create secret generic ${name} .*--from-literal=${key}=`));
    }
    for (const [, name, key] of text.matchAll(/configMapKeyRef:\s+name: (\S+)\s+key: (\S+)/g)) {
      expect(guide).toMatch(new RegExp(`create configmap ${name} .*--from-literal=${key}=`));
    }
    expect(manifests.map(({ kind }) => kind)).not.toContain('Secret');
  });
});

describe('the manifests of learning on many machines', () => {
  const folder = path.join(FOLDER, 'learning');
  const own = manifestsIn(folder).flatMap((file) => readYaml(file, folder));
  const named = (kind: string, name: string): Manifest =>
    own.find((manifest) => manifest.kind === kind && manifest.metadata.name === name)!;
  const worker = named('Deployment', 'learning-worker').spec.template;
  const run = named('Job', 'learn').spec.template;
  const argsOf = (template: typeof worker): string[] => template.spec.containers[0].args;
  const argument = (template: typeof worker, flag: string) =>
    argsOf(template)
      .find((arg) => arg.startsWith(`--${flag}=`))
      ?.split('=')[1];

  test.each(own.map((manifest) => [`${manifest.kind} ${manifest.metadata.name}`, manifest] as const))(
    '%s is what its schema says',
    async (_name, manifest) => {
      await validate(manifest);
    },
  );

  test('the kustomization names all of them, and the namespace of the others', () => {
    type Kustomization = { namespace: string; resources: string[]; images: { name: string }[] };
    const [kustomization] = readYaml(KUSTOMIZATION, folder) as unknown as [Kustomization];
    expect(kustomization.resources.toSorted()).toEqual(manifestsIn(folder).toSorted());
    expect(kustomization.namespace).toBe(find('Namespace', 'maskroute').metadata.name);
    for (const { spec } of [worker, run])
      expect(kustomization.images.map(({ name }) => name)).toContain(spec.containers[0].image);
  });

  test('the scaler starts workers by the length of the queue that runs fill', () => {
    const { scaleTargetRef, triggers } = named('ScaledObject', 'learning-worker').spec;
    expect(scaleTargetRef).toMatchObject({ kind: 'Deployment', name: 'learning-worker' });
    expect(triggers[0].metadata.listName).toBe(`bull:${QUEUE_NAME}:wait`);
    const { port } = named('Service', 'learning-queue').spec.ports[0];
    expect(triggers[0].metadata.address).toBe(`learning-queue.maskroute.svc:${port}`);
    for (const template of [worker, run])
      expect(argument(template, 'queue')).toBe(`redis://learning-queue:${port}`);
  });

  test('run and workers see one journal, and may speak to the queue', () => {
    expect(argument(worker, 'journal')).toBe(argument(run, 'journal'));
    expect(argument(worker, 'model')).toBe(argument(run, 'model'));
    const claims = [...own, ...manifests].filter(({ kind }) => kind === 'PersistentVolumeClaim');
    for (const { spec } of [worker, run]) {
      const used = spec.volumes.flatMap((one: { persistentVolumeClaim?: { claimName: string } }) =>
        one.persistentVolumeClaim === undefined ? [] : [one.persistentVolumeClaim.claimName],
      );
      expect(claims.map(({ metadata }) => metadata.name)).toEqual(expect.arrayContaining(used));
      const mounts = spec.containers[0].volumeMounts as { mountPath: string }[];
      const journal = argument({ spec }, 'journal')!;
      expect(mounts.some(({ mountPath }) => journal.startsWith(`${mountPath}/`))).toBe(true);
    }
    const queue = named('Deployment', 'learning-queue').spec.template.metadata.labels;
    const policy = named('NetworkPolicy', 'learning-queue').spec;
    expect(queue).toMatchObject(policy.podSelector.matchLabels);
    expect(queue).toMatchObject(named('Service', 'learning-queue').spec.selector);
    const [fromWorker, fromRun] = policy.ingress[0].from;
    expect(worker.metadata.labels).toMatchObject(fromWorker.podSelector.matchLabels);
    expect(run.metadata.labels).toMatchObject(fromRun.podSelector.matchLabels);
  });

  test.each([
    ['work', worker],
    ['learn', run],
  ])('%s knows the options that it is given', async (command, template) => {
    expect(argsOf(template)[0]).toBe(command);
    const help = await helpOf(command);
    for (const [option] of argsOf(template)
      .join(' ')
      .matchAll(/--[a-z]+/g))
      expect(help).toContain(`  ${option} <`);
  });
});

test('the guide sets every variable before it uses it, and keeps every secret that it makes', () => {
  const guide = readFileSync('docs/deploy.md', 'utf8');
  const blocks = [...guide.matchAll(/^```\n(.*?)^```/gms)].map(([, block]) => block!);
  const lines = blocks.flatMap((block) => block.split('\n'));
  const known = new Set<string>();
  for (const line of lines) {
    for (const [, name] of line.matchAll(/\$([A-Z_]+)/g)) expect([...known], line).toContain(name);
    for (const [, name] of line.matchAll(/(?:^|\s)([A-Z_]+)=/g)) known.add(name!);
    // What goes from a generator straight into a secret is known to nobody.
    expect(line).not.toMatch(/rand .*\| .*secret put/);
  }
});

/** @throws Error with what Kubernetes' schema of its kind has against it. */
async function validate(manifest: Manifest): Promise<void> {
  const { apiVersion, kind } = manifest;
  const models = apiVersion.startsWith('keda.sh/') ? '@kubernetes-models/keda' : 'kubernetes-models';
  const module: Record<string, new (data: unknown) => { validate(): void }> = await import(
    `${models}/${apiVersion}/${kind}`
  );
  new module[kind]!(manifest).validate();
}

describe('the image of the backend', () => {
  const text = readFileSync('deploy/Containerfile', 'utf8');

  test('copies what is there, and lets all of it through', () => {
    const ignore = readFileSync('.dockerignore', 'utf8').split('\n');
    for (const [, sources] of text.matchAll(/^COPY (?!--from)(.+) \S+$/gm)) {
      for (const source of sources!.split(' ')) {
        expect(existsSync(source), source).toBe(true);
        expect(ignore, source).toContain(`!${source}`);
      }
    }
  });

  test('holds everything that a backend imports', () => {
    const { dependencies, optionalDependencies } = JSON.parse(readFileSync('package.json', 'utf8'));
    const imported = readImports('.', ['gpu-backend', 'shared'])
      // Benches measure peers, and run where the development dependencies are.
      .filter(({ from }) => !from.startsWith('gpu-backend/bench/'))
      .flatMap(({ to }) => (to.startsWith('npm:') ? [to.slice('npm:'.length)] : []));
    const installed = Object.keys({ ...dependencies, ...optionalDependencies });
    expect(installed).toEqual(expect.arrayContaining([...new Set(imported)]));
  });

  test('leaves out only what a backend never imports', () => {
    const names = text.match(/(?<=\s)node_modules\/\S+/g)!;
    // ONNX Runtime's and Dawn's own folders are gone in part.
    const packages = names
      .filter((name) => !name.includes('*'))
      .map((name) => name.slice('node_modules/'.length));
    expect(packages).toEqual(['miniflare', 'esbuild', '@esbuild']);
    const own = /^gpu-backend\/(?:bench|dev)\//;
    const used = readImports('.', ['gpu-backend', 'shared', 'bin'])
      .filter(({ from }) => !own.test(from))
      .map(({ to }) => to);
    expect(used.filter((to) => packages.some((name) => to.startsWith(`npm:${name}`)))).toEqual([]);
    for (const name of names.filter((one) => one.includes('*'))) {
      expect(globSync(name), name).not.toEqual([]);
      expect(name).not.toContain('linux');
    }
  });

  test('needs no file outside of what it copies', () => {
    const copied = globSync('gpu-backend/**/*.ts').flatMap((file) =>
      [...readFileSync(file, 'utf8').matchAll(/'(?:\.\.\/)+(workers\/[^']+)'/g)].map(([, target]) => target!),
    );
    for (const target of copied) expect(text).toContain(`COPY ${path.posix.dirname(target)} `);
  });
});

describe('wrangler.toml', () => {
  type Environment = Record<string, unknown> & { readonly vars: object };
  const text = readFileSync('wrangler.toml', 'utf8');
  const top = parseToml(text) as Environment;
  const env = top.env as Record<string, Environment>;
  /** Bindings are not inherited: one that an environment forgets is missing only once it is deployed. */
  const bindings = (value: unknown): string[] => {
    if (Array.isArray(value)) return value.flatMap(bindings);
    if (typeof value !== 'object' || value === null) return [];
    return Object.entries(value).flatMap(([name, inner]) =>
      name === 'binding' || (name === 'name' && ('class_name' in value || 'namespace_id' in value))
        ? [String(inner)]
        : bindings(inner),
    );
  };

  const withoutEnvironments = { ...top, env: undefined };

  /** What the worker uses, by its own declaration. */
  const NETWORK = 'BACKEND_NETWORK';
  const platform = /DurableObjectNamespace|D1Database|Fetcher|TextEmbedding|RateLimit|Queue|AnalyticsEngine/;
  const used = [...readFileSync('workers/env.ts', 'utf8').matchAll(/^ {2}readonly ([A-Z_]+)\??: (.+);$/gm)]
    .filter(([, , type]) => platform.test(type!))
    .map(([, name]) => name!);

  test('makes the class of every Durable Object, and the worker exports it', () => {
    const classes = (top.durable_objects as { bindings: { class_name: string }[] }).bindings;
    const made = (top.migrations as { new_sqlite_classes: string[] }[]).flatMap(
      (one) => one.new_sqlite_classes,
    );
    const names = classes.map(({ class_name }) => class_name);
    expect(made.toSorted()).toEqual(names.toSorted());
    const worker = readFileSync('workers/index.ts', 'utf8');
    for (const name of names) expect(worker).toMatch(new RegExp(`export \\{[^}]*\\b${name}\\b`));
  });

  test.each(Object.keys(env))('%s declares every binding, and its own state', (name) => {
    expect(bindings(env[name])).toEqual(expect.arrayContaining(bindings(withoutEnvironments)));
    // Workers AI and a private network need an account: environments declare the one and name the other.
    expect(bindings(env[name]).toSorted()).toEqual([...used].filter((one) => one !== NETWORK).toSorted());
    expect(text).toContain(`# [[env.${name}.vpc_networks]]\n# binding = "${NETWORK}"`);
    const database = (environment: Environment) =>
      (environment.d1_databases as { database_name: string }[])[0]!.database_name;
    expect(database(env[name]!)).not.toBe(database(top));
  });

  test.each(Object.keys(env))(
    '%s believes Cloudflare where requests come from, one machine nobody',
    (name) => {
      expect(env[name]!.vars).toMatchObject({ TRUSTED_FRONT: 'cloudflare', EDGE_URL: expect.any(String) });
      expect(top.vars).not.toHaveProperty('TRUSTED_FRONT');
    },
  );

  test('holds no secret', () => {
    const secrets = ['BACKEND_KEY', 'ADMIN_KEY', 'HF_TOKEN', 'OTEL_EXPORTER_OTLP_HEADERS'];
    for (const environment of [top, ...Object.values(env)]) {
      for (const secret of secrets) expect(Object.keys(environment.vars)).not.toContain(secret);
    }
  });
});
