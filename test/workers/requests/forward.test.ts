/** What a backend is sent says the same as the client's body and what was added, whatever the client's text looks like. */
import fc from 'fast-check';
import { expect, it } from 'vitest';
import { forwardedBody } from '../../../workers/requests/forward.ts';

const ADDED = { mask: 'm_1', maskroute: { cluster: 3, label: '"}' } };
const plainly = (value: object) => JSON.parse(JSON.stringify({ ...value, ...ADDED }));
const forwarded = (text: string) => JSON.parse(forwardedBody({ value: JSON.parse(text), text }, ADDED));

it.each([
  '{"model":"a"}',
  ' {\n "model" : "a" , "x" : {} } \n\t',
  '{"model":"a","model":"b","content":"}} {\\"mask\\": 1"}',
  '{"model":"a","mask":null,"maskroute":{"cluster":9}}',
  '{"mask":"m_2","model":"a","mask":"m_3"}',
  '{"model":"\\ud800 🙂","__proto__":{"mask":1},"n":1e3}',
])('%s', (text) => {
  expect(forwarded(text)).toEqual(plainly(JSON.parse(text)));
});

it('any other', () => {
  fc.assert(
    fc.property(fc.dictionary(fc.string(), fc.jsonValue(), { minKeys: 1 }), fc.nat(4), (value, indent) => {
      const text = JSON.stringify(value, null, indent);
      expect(forwarded(text)).toEqual(plainly(JSON.parse(text)));
    }),
  );
});
