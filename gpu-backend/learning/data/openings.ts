/** Beginnings of texts of many kinds: the model continues them to generate text for its own calibration. */
export type Opening =
  /** A plain text's first words. */
  | { readonly text: string }
  /** A user's question, under the model's chat template. */
  | { readonly ask: string };

const ask = (question: string): Opening => ({ ask: question });
const text = (words: string): Opening => ({ text: words });

/** Kinds alternate, so that the first few are a mix, too. */
export const OPENINGS: readonly Opening[] = [
  ask('How do bees find their way back to the hive?'),
  text('The city lies on the northern bank of the river and was founded in'),
  text('def read_table(path, separator=","):\n    """Reads a table'),
  ask(
    'A baker makes 24 rolls an hour for 5 hours and sells 90 of them. How many are left? Explain each step.',
  ),
  text('We study the problem of learning from few examples. In this paper'),
  ask('I would like to book a table for four people on Friday evening.'),
  text('"I never thought you would come," she said, and closed the door'),
  ask('Correct the grammar of this sentence: She dont like when peoples is late.'),
  text('LONDON - The government announced on Tuesday that'),
  ask('Write a Python function that returns all prime numbers below n.'),
  text('Ingredients: 2 cups of flour, 1 teaspoon of salt, 3 eggs\n\nMethod:'),
  ask('Summarize the causes of the First World War in three sentences.'),
  text('In biology, a cell membrane is'),
  text('Q: What is the capital of Australia?\nA:'),
  ask('Give me five ideas for a birthday party for a child who loves dinosaurs.'),
  text('Theorem. Let f be a continuous function on the interval [a, b]. Then'),
  text('Dear Ms. Novak,\n\nthank you for your letter of'),
  ask('Translate into French: The train leaves at nine and arrives before noon.'),
  text('function sum(values) {\n  let total = 0;\n'),
  ask('My phone does not charge any more. What can I try?'),
  text('The album was recorded in 1974 and released by'),
  text('Patients with high blood pressure were randomly assigned to'),
  ask('Is the following review positive or negative? "The food was cold and the waiter was rude."'),
  text('Once upon a time, in a village at the edge of the forest, there lived'),
  ask('If a shirt costs $40 and is reduced by 15 percent, what does it cost now?'),
  text('{"name": "Ada", "age": 36, "languages": ['),
  ask('What is the difference between weather and climate?'),
  text('SELECT customers.name, COUNT(orders.id) FROM'),
  text('The law of 1833 provided that'),
  ask('You are a travel agent. Plan a weekend in Rome for a family with two children.'),
  text('Der Fluss entspringt in den Alpen und'),
  ask('Classify these words as noun, verb or adjective: run, blue, table, think, heavy.'),
  text('The match ended 2-1 after a late goal by'),
  text('Step 1: Turn off the power. Step 2:'),
  ask('Why does ice float on water?'),
  text('#include <stdio.h>\n\nint main(void) {\n'),
  ask('Write a short poem about the sea in autumn.'),
  text('He was born in a small town in Ohio, the third of five children, and'),
  text('Speaker A: Did you see the game last night?\nSpeaker B:'),
  ask('Explain recursion to somebody who has never written a program.'),
  text('The results in Table 2 show that our method'),
  ask('What should I wear to an interview at a bank?'),
  text('La reunión empezó a las diez y'),
  text('The species is found in tropical forests from'),
  ask('Tom has twice as many apples as Ann. Together they have 36. How many has Tom?'),
  text('import numpy as np\n\nclass Model:\n    def __init__(self'),
  ask('Rewrite this sentence so that it sounds more polite: Send me the report now.'),
  text('Chapter 3\n\nThe rain had stopped by the time they reached'),
];
