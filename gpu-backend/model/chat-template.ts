/** A conversation as the one text that the model was trained on: the model's own Jinja template. */
import { Template } from '@huggingface/jinja';
import { MaskrouteError } from '../../shared/errors.ts';
import { unsupportedModel } from './model-errors.ts';

export type TemplateMessage = { readonly role: string; readonly content: string };

/** For models that bring no template; llama.cpp does the same. */
export const CHATML_TEMPLATE =
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}" +
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

export type ChatTemplate = {
  /** Ends where the answer begins. @throws MaskrouteError `invalid_request` when the template refuses. */
  render(messages: readonly TemplateMessage[]): string;
};

/** `tokens`: the texts of BOS and EOS, which some templates write. @throws MaskrouteError `unsupported_model`. */
export function createChatTemplate(
  source: string | null,
  tokens: { readonly bos: string; readonly eos: string },
): ChatTemplate {
  let template: Template;
  try {
    template = new Template(source ?? CHATML_TEMPLATE);
  } catch (error) {
    throw unsupportedModel(`its chat template cannot be parsed (${(error as Error).message})`);
  }
  return {
    render(messages) {
      try {
        return template.render({
          // Copies: a template can assign to what it is given.
          messages: messages.map(({ role, content }) => ({ role, content })),
          add_generation_prompt: true,
          bos_token: tokens.bos,
          eos_token: tokens.eos,
        });
      } catch (error) {
        const reason = (error as Error).message;
        throw new MaskrouteError(
          'invalid_request',
          `The model's chat template refuses the messages: ${reason}`,
          {
            param: 'messages',
            cause: error,
          },
        );
      }
    },
  };
}
