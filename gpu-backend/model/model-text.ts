/** Text and conversations to token ids and back, for one installed model. */
import type { ChatMessage } from '../../shared/openai.ts';
import { messageText } from '../../shared/openai.ts';
import { createChatTemplate } from './chat-template.ts';
import type { TokenDecoder, Tokenizer } from './tokenizer.ts';
import { loadTokenizer } from './tokenizer.ts';

export type ModelText = {
  readonly tokenizer: Tokenizer;
  /** Special tokens that the text spells out are recognised; the model's BOS is added where it wants one. */
  encodePrompt(text: string): Int32Array;
  /** Under the model's chat template, ready for the answer. @throws MaskrouteError `invalid_request`. */
  encodeChat(messages: readonly ChatMessage[]): Int32Array;
  tokenBytes(tokenId: number): Uint8Array;
  createDecoder(options: { readonly showSpecial: boolean }): TokenDecoder;
  readonly tokenBytesMax: number;
};

/** What of a model's manifest text depends on. */
export type TextManifest = {
  readonly chatTemplate: string | null;
  readonly bosTokenId: number | null;
  readonly eosTokenIds: readonly number[];
};

/** `folder`: the model's in the store. */
export async function openModelText(folder: string, manifest: TextManifest): Promise<ModelText> {
  const tokenizer = await loadTokenizer(folder);
  const name = (id: number | null | undefined) =>
    id === null || id === undefined ? '' : new TextDecoder().decode(tokenizer.tokenBytes(id));
  const template = createChatTemplate(manifest.chatTemplate, {
    bos: name(manifest.bosTokenId),
    eos: name(manifest.eosTokenIds[0]),
  });
  return {
    tokenizer,
    encodePrompt: (text) => tokenizer.encode(text),
    encodeChat: (messages) =>
      // The template writes BOS itself where the model wants one.
      tokenizer.encode(
        template.render(messages.map((message) => ({ role: message.role, content: messageText(message) }))),
        { addSpecial: false },
      ),
    tokenBytes: tokenizer.tokenBytes,
    createDecoder: tokenizer.createDecoder,
    tokenBytesMax: tokenizer.tokenBytesMax,
  };
}
