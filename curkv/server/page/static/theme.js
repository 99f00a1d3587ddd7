// The button that chooses the colours: the system's, light or dark.

const THEMES = { auto: ["◐ Auto", "as the system"], light: ["○ Light", "light"], dark: ["● Dark", "dark"] };
const button = document.getElementById("theme");

function chosen() {
  return localStorage.getItem("theme") ?? "auto";
}

function show(name) {
  const [label, words] = THEMES[name];
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  button.textContent = label;
  button.setAttribute("aria-label", `Colours: ${words}`);
}

// `repaint` is called when the colours have changed by the button.
export function start(repaint = () => {}) {
  show(chosen());
  button.addEventListener("click", () => {
    const names = Object.keys(THEMES);
    localStorage.setItem("theme", names[(names.indexOf(chosen()) + 1) % names.length]);
    show(chosen());
    repaint();
  });
}
