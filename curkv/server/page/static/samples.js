// Texts to try: a log of a harbour with one fact hidden in it, in three lengths.

const LINES = [
  "The tide turned shortly after six and two trawlers left the inner basin under a grey sky.",
  "A crate of lamp oil was moved from the north shed to the chandlery and signed for by the clerk.",
  "Rain set in before noon, and the crane on the long pier stood still until the wind had dropped.",
  "The ferry from the island arrived with forty passengers, three bicycles and a crated piano.",
  "Repairs to the slipway went on; the carpenter asked for six more oak planks and a barrel of pitch.",
  "A school class visited the lighthouse and was shown the lamp, the log books and the old foghorn.",
  "The pilot reported a drifting buoy off the point and towed it back before the evening fog came in.",
  "Herring sold well at the morning auction, and most of the boats were empty again by nine.",
  "The harbour master measured the depth of the channel at low water and found it unchanged.",
  "Two sailors from the schooner asked for a doctor, who bandaged a hand and sent them back on board.",
  "The coal barge was late, so the tug lay at the east quay and its crew mended nets all afternoon.",
  "A letter came from the ministry with new rules for lanterns, and copies were nailed to every door.",
];

function log(sentences) {
  const lines = Array.from({ length: sentences }, (_, i) => LINES[(i * 5 + Math.floor(i / LINES.length)) % LINES.length]);
  lines.splice(Math.floor(sentences * 0.4), 0, "The code of the vault in the customs house is 4711.");
  const days = [];
  for (let i = 0; i < lines.length; i += 6) days.push(`Day ${i / 6 + 1}. ${lines.slice(i, i + 6).join(" ")}`);
  return days.join("\n\n");
}

const question = "What is the code of the vault in the customs house?";

export const SAMPLES = [
  { name: "Harbour log, one page", text: log(22), question },
  { name: "Harbour log, a week", text: log(52), question },
  { name: "Harbour log, a month", text: log(170), question },
  { name: "Your own text", text: "", question: "" },
];
