/**
 * The home page of an edge and its API documentation. The build writes them as static files without scripts; they load
 * one style sheet, from the same edge.
 */
import { html } from 'hono/html';
import type { JsonSchema, OpenApi, Operation } from '../../shared/openapi/document.ts';

type Html = ReturnType<typeof html>;

const page = (title: string, style: string, main: Html): Html => html`<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>${title}</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="${style}">
</head>
<body>
<main class="container">${main}</main>
</body>
</html>
`;

/** @param style the address of the style sheet. */
export const homePage = ({ info }: OpenApi, style: string): Html =>
  page(
    'Maskroute',
    style,
    html`
<h1>Maskroute</h1>
<p>This is an edge of Maskroute ${info.version}: one language model under many block masks. It embeds a prompt, picks the
mask of the nearest cluster, and a backend decodes the whole answer under it.</p>
<h2>Where to go</h2>
<ul>
<li><a href="/docs">Documentation of the API</a>, and the same as <a href="/openapi.json">OpenAPI 3.1</a></li>
<li><a href="/dashboard">Dashboard</a>, with an admin key</li>
<li><a href="/readyz">Whether this edge can answer</a></li>
</ul>
<h2>Ask</h2>
<p>It speaks OpenAI's wire: any client works with this edge's address followed by <code>/v1</code>, and a tenant's key.</p>
<pre><code>curl EDGE/v1/chat/completions -H 'authorization: Bearer API_KEY' -H 'content-type: application/json' \\
  -d '{"model": "MODEL", "messages": [{"role": "user", "content": "Hello!"}]}'</code></pre>
`,
  );

/** The whole API on one page. */
export function docsPage(api: OpenApi, style: string): Html {
  const operations = Object.entries(api.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, operation]) => ({ path, method: method.toUpperCase(), operation })),
  );
  const { schemas, securitySchemes } = api.components;
  return page(
    'Maskroute API',
    style,
    html`
<h1>Maskroute API ${api.info.version}</h1>
<p>The same as <a href="/openapi.json">OpenAPI 3.1</a>. Keys go into <code>Authorization: Bearer</code>. Lists have pages:
<code>limit</code> is the page size, and <code>before</code> takes the <code>next</code> of the previous page.</p>
<nav><ul>${api.tags.map(({ name }) => html`<li><a href="#${anchor(name)}">${name}</a></li>`)}</ul></nav>
<ul>${Object.entries(securitySchemes).map(
      ([name, { description }]) => html`<li><strong>${name}</strong>: ${code(description)}</li>`,
    )}</ul>
${api.tags.map(
  ({ name, description }) => html`
<h2 id="${anchor(name)}">${name}</h2>
<p>${code(description)}</p>
${operations
  .filter(({ operation }) => operation.tags.includes(name))
  .map(({ path, method, operation }) => describe(path, method, operation))}`,
)}
<h2 id="schemas">Answers</h2>
${Object.entries(schemas).map(
  ([name, schema]) => html`
<details id="${name}"><summary><strong>${name}</strong></summary>${fields(schema)}</details>`,
)}
`,
  );
}

const anchor = (tag: string): string => tag.toLowerCase().replaceAll(' ', '-');

/** Text with words between backticks. */
const code = (text: string) =>
  text.split('`').map((part, index) => (index % 2 === 1 ? html`<code>${part}</code>` : part));

function describe(path: string, method: string, operation: Operation): Html {
  const { operationId, summary, description, security, parameters, requestBody, responses } = operation;
  const body = requestBody?.content['application/json']?.schema;
  const keys = security.flatMap((one) => Object.keys(one)).join(' or ');
  return html`
<details id="${operationId}">
<summary><code>${method}</code> <code>${path}</code> ${code(summary)}</summary>
${description === undefined ? '' : html`<p>${code(description)}</p>`}
<p>${keys === '' ? 'Needs no key.' : html`Needs: ${keys}.`}</p>
<pre><code>${curl(path, method, operation)}</code></pre>
${parameters.length === 0 ? '' : html`<h3>Parameters</h3>${table(parameters)}`}
${body === undefined ? '' : html`<h3>Body</h3>${fields(body)}`}
<h3>Answers</h3>
<div class="wide" role="group" aria-label="Answers" tabindex="0"><table><tbody>${Object.entries(
    responses,
  ).map(
    ([status, response]) => html`
<tr><td>${status}</td><td>${code(response.description)}</td><td>${links(response.content)}</td></tr>`,
  )}</tbody></table></div>
</details>`;
}

function curl(path: string, method: string, { security, requestBody }: Operation): string {
  const schema = requestBody?.content['application/json']?.schema;
  return [
    `curl ${method === 'GET' || method === 'POST' ? '' : `-X ${method} `}EDGE${path.replaceAll(/\{(\w+)\}/g, (_, name) => name.toUpperCase())}`,
    ...(security.length === 0 ? [] : [`-H 'authorization: Bearer KEY'`]),
    ...(schema === undefined
      ? method === 'POST'
        ? [requestBody === undefined ? '-X POST' : '--data-binary @FILE']
        : []
      : [`-H 'content-type: application/json'`, `-d '${JSON.stringify(sample(schema))}'`]),
  ].join(' \\\n  ');
}

/** A sample value with the required fields. */
function sample(schema: JsonSchema): unknown {
  const { type, properties, required, anyOf, enum: values } = schema as Shape;
  if ('const' in schema) return schema.const;
  if (values !== undefined) return values[0];
  if (anyOf !== undefined) return sample(anyOf[0]!);
  if (properties !== undefined) {
    return Object.fromEntries((required ?? []).map((name) => [name, sample(properties[name]!)]));
  }
  if (type === 'array') return [sample((schema as Shape).items ?? {})];
  if (type === 'integer' || type === 'number') return 1;
  return type === 'boolean' ? true : '…';
}

type Shape = {
  readonly type?: string | readonly string[];
  readonly properties?: Record<string, JsonSchema>;
  readonly required?: readonly string[];
  readonly anyOf?: readonly JsonSchema[];
  readonly oneOf?: readonly JsonSchema[];
  readonly items?: JsonSchema;
  readonly enum?: readonly unknown[];
  readonly $ref?: string;
};
type Field = { readonly name: string; readonly required: boolean; readonly schema: JsonSchema };

/** A table of an object's fields, for each form of the object. */
function fields(schema: JsonSchema): Html {
  const { anyOf, properties } = schema as Shape;
  if (properties === undefined && anyOf !== undefined) {
    return html`${anyOf.map((form, index) => html`<p>Form ${index + 1}</p>${fields(form)}`)}`;
  }
  const all = fieldsOf(schema);
  const plain = all.filter((field) => field.schema['x-field'] === undefined);
  const named = (kind: string) =>
    all.filter((field) => field.schema['x-field'] === kind).map(({ name }) => name);
  const refused = named('refused');
  const ignored = named('ignored');
  return html`${table(plain)}
${refused.length === 0 ? '' : html`<p>Refused, except for values that ask for the default behaviour: ${refused.join(', ')}.</p>`}
${ignored.length === 0 ? '' : html`<p>Ignored, and named in a header: ${ignored.join(', ')}.</p>`}`;
}

function fieldsOf(schema: JsonSchema): Field[] {
  const { properties = {}, required = [] } = schema as Shape;
  return Object.entries(properties).map(([name, inner]) => ({
    name,
    required: required.includes(name),
    schema: inner,
  }));
}

const DEPTH_MAX = 4;

function rows({ name, required, schema }: Field, depth: number): Html[] {
  const below = depth < DEPTH_MAX ? objectIn(schema) : undefined;
  return [
    html`
<tr><td><code>${name}</code></td><td>${required ? 'required' : ''}</td><td>${typeName(schema)}</td></tr>`,
    ...(below === undefined ? [] : fieldsOf(below.schema)).flatMap((field) =>
      rows({ ...field, name: `${name}${below!.suffix}.${field.name}` }, depth + 1),
    ),
  ];
}

/** The object in a field, or in the items of a list. */
function objectIn(schema: JsonSchema): { schema: JsonSchema; suffix: string } | undefined {
  const { properties, items, anyOf = [] } = schema as Shape;
  if (properties !== undefined) return { schema, suffix: '' };
  if (items !== undefined) {
    const inner = objectIn(items);
    return inner && { schema: inner.schema, suffix: `[]${inner.suffix}` };
  }
  for (const form of anyOf) {
    const found = objectIn(form);
    if (found !== undefined) return found;
  }
  return undefined;
}

const table = (all: readonly Field[]): Html =>
  all.length === 0
    ? html`<p>No fields.</p>`
    : html`<div class="wide" role="group" aria-label="Fields" tabindex="0"><table><thead><tr><th>field</th><th>required</th><th>type</th></tr></thead><tbody>${all.flatMap((field) => rows(field, 0))}</tbody></table></div>`;

function links(content: Operation['responses'][string]['content']): Html {
  const shown = Object.entries(content ?? {}).map(([type, { schema }]) => {
    const { $ref, properties } = (schema ?? {}) as Shape;
    const target = $ref ?? ((properties?.data as Shape | undefined)?.items as Shape | undefined)?.$ref;
    const name = target?.split('/').at(-1);
    return name === undefined ? html`${type} ` : html`<a href="#${name}">${name}</a> `;
  });
  return html`${shown}`;
}

/** A description of a type: `a string`, `"all" or "answers"`, `a number from 0 to 1`. */
function typeName(schema: JsonSchema): string {
  const { type, anyOf, oneOf, items, enum: values, $ref } = schema as Shape;
  const described = typeof schema.description === 'string' ? `${schema.description}. ` : '';
  const preset = schema.default === undefined ? '' : `; ${JSON.stringify(schema.default)} unless given`;
  return `${described}${kind()}${preset}`;

  function kind(): string {
    if ($ref !== undefined) return $ref.split('/').at(-1)!;
    if ('const' in schema) return JSON.stringify(schema.const);
    if (values !== undefined) return values.map((value) => JSON.stringify(value)).join(', ');
    const forms = anyOf ?? oneOf;
    if (forms !== undefined) return forms.map(typeName).join(' or ');
    if (type === 'array') return `a list${limits('Items')} of: ${typeName(items ?? {})}`;
    if (type === 'string') return `${STRINGS[String(schema.format)] ?? 'a string'}${limits('Length')}`;
    if (type === 'integer' || type === 'number') {
      return `${type === 'integer' ? 'a whole number' : 'a number'}${range()}`;
    }
    if (type === undefined) return 'any JSON';
    return [type].flat().join(' or ');
  }
  function limits(what: 'Items' | 'Length'): string {
    const most = schema[`max${what}`];
    return most === undefined ? '' : `, at most ${most}${what === 'Length' ? ' characters' : ''}`;
  }
  function range(): string {
    const bounds = [
      ['minimum', 'from'],
      ['exclusiveMinimum', 'above'],
      ['maximum', 'to'],
      ['exclusiveMaximum', 'below'],
    ] as const;
    return bounds
      .filter(
        ([name]) => schema[name] !== undefined && Math.abs(Number(schema[name])) !== Number.MAX_SAFE_INTEGER,
      )
      .map(([name, word]) => ` ${word} ${schema[name]}`)
      .join('');
  }
}

const STRINGS: Readonly<Record<string, string>> = {
  'date-time': 'a time such as 2026-01-31T12:00:00Z',
  date: 'a date such as 2026-01-31',
  uri: 'an address',
};
