/** Structured outputs: compiles a request's `response_format` and `tools` into one grammar. */
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { type ChatRequest, readToolChoice, type Tool } from '../../shared/wire/openai.ts';
import { isNestedWithin } from '../../shared/wire/parse-body.ts';
import { nextTurn } from '../event-loop.ts';
import type { GrammarCall, PreparedGrammar } from '../grammar/grammars.ts';
import { schemaGrammar } from '../grammar/json-schema.ts';
import { nothingSpent, type Spent } from '../grammar/schema-limits.ts';
import type { SchemaOptions } from '../grammar/schema-reader.ts';
import type { CallsSpec, GrammarSpec } from '../grammar/xgrammar.ts';
import type { ToolFormat } from '../model/tokenizer/tool-format.ts';
import type { ServedModel } from './parts.ts';

export type AnswerForm = {
  readonly grammar: PreparedGrammar | undefined;
  /** Tools for the prompt. */
  readonly tools: readonly Tool[];
  /** The model's format of tool calls; undefined if the answer may not call tools. */
  readonly calls: ToolFormat | undefined;
};

const FREE: AnswerForm = { grammar: undefined, tools: [], calls: undefined };

/** Rejects with MaskrouteError `invalid_schema`, and as `Grammars.prepare`. */
export async function answerForm(
  { grammars, text }: ServedModel,
  call: GrammarCall,
  request: ChatRequest,
): Promise<AnswerForm> {
  const tools = readToolChoice(request.tool_choice).mode === 'none' ? [] : (request.tools ?? []);
  requireShallow(tools, 'tools');
  const spent = nothingSpent();
  const answer = textForm(request, spent);
  if (answer === undefined && tools.length === 0) return FREE;
  const calls = tools.length === 0 ? undefined : await callsSpec(request, tools, text.toolFormat, spent);
  const param = answer === undefined ? 'tools' : 'response_format';
  const spec: GrammarSpec = { answer, calls };
  const grammar = await grammars.prepare(spec, { ...call, param });
  return { grammar, tools, calls: calls && text.toolFormat };
}

/** EBNF for an answer without tool calls; undefined: any text. */
function textForm({ response_format: format }: ChatRequest, spent: Spent): string | undefined {
  switch (format?.type) {
    case undefined:
    case 'text':
      return undefined;
    case 'json_object':
      return schemaGrammar({ type: 'object' }, { strict: false, param: 'response_format' });
    case 'json_schema': {
      const { schema, strict } = format.json_schema!;
      const param = 'response_format.json_schema.schema';
      requireShallow(schema, param);
      return schemaGrammar(schema ?? { type: 'object' }, { strict: strict === true, param, spent });
    }
  }
}

async function callsSpec(
  request: ChatRequest,
  tools: readonly Tool[],
  format: ToolFormat,
  spent: Spent,
): Promise<CallsSpec> {
  const { mode, names, isSingle } = readToolChoice(request.tool_choice);
  const specs: CallsSpec['tools'][number][] = [];
  let turnSince_ms = performance.now();
  for (const [i, { function: called }] of tools.entries()) {
    const { name, parameters, strict } = called;
    if (names?.includes(name) === false) continue;
    // Lets other requests' tokens go out between large schemas.
    if (performance.now() - turnSince_ms > TURN_MAX_ms) {
      await nextTurn();
      turnSince_ms = performance.now();
    }
    const param = `tools[${i}].function.parameters`;
    const options = { strict: strict === true, param, spent };
    const argumentsGrammar = argumentsOf(ofObjects(parameters), options);
    specs.push({ begin: `${format.begin}${name}${format.middle}`, argumentsGrammar, end: format.end });
  }
  return {
    tools: specs,
    trigger: format.trigger,
    separator: format.separator,
    isRequired: mode === 'required',
    isSingle: isSingle || request.parallel_tool_calls === false || format.isSingle,
  };
}

const TURN_MAX_ms = 5;

/**
 * Arguments that keep `schema`. Without `strict`, they are any object once the request's schemas have used up the limits:
 * OpenAI enforces no such schema either. @throws MaskrouteError `invalid_schema`.
 */
function argumentsOf(
  schema: Record<string, unknown>,
  options: SchemaOptions & { readonly spent: Spent },
): string {
  const { strict, param, spent } = options;
  const before = { ...spent };
  try {
    if (strict || !spent.isFull) return schemaGrammar(schema, options);
  } catch (error) {
    if (strict) throw error;
    // A schema that is refused by itself is refused here.
    schemaGrammar(schema, { strict, param });
    Object.assign(spent, before, { isFull: true });
  }
  return schemaGrammar({ type: 'object' }, { strict, param });
}

/** The arguments' schema, with `type: object` if it does not say a type. */
function ofObjects(parameters: Tool['function']['parameters']): Record<string, unknown> {
  if (parameters == null || Object.keys(parameters).length === 0)
    return { type: 'object', additionalProperties: false };
  const says = ['type', '$ref', 'anyOf', 'oneOf', 'allOf', 'enum', 'const'].some(
    (name) => name in parameters,
  );
  return says ? parameters : { ...parameters, type: 'object' };
}

const NESTED_MAX = 64;
function requireShallow(value: unknown, param: string): void {
  if (isNestedWithin(value, NESTED_MAX)) return;
  const message = `${param}: nested more than ${NESTED_MAX} levels deep.`;
  throw new MaskrouteError('invalid_schema', message, { param });
}
