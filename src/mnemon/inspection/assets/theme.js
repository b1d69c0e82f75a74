// Light and dark, and the colours of the figures.

/**
 * Amounts: lightness runs one way from the page's own background, in blues alone on light and from blue to yellow on
 * dark, so that the order survives every kind of colour blindness and a grey printer.
 */
const RAMPS = {
  light: ["#f3f4f1", "#d5e4e2", "#abd0d4", "#79b5c5", "#4a95b4", "#2b739d", "#1f517d", "#17335c", "#0d1838"],
  dark: ["#1b1f26", "#1d3350", "#2b4a6f", "#49627c", "#6f7b7f", "#97967a", "#c2b26d", "#e6d06c", "#fff3b0"],
};

/** Okabe and Ito's colours, told apart by all, and lighter ones for dark; the last one is the ink's. */
const CATEGORIES = {
  light: ["#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9", "#e0d21f", null],
  dark: ["#3d9be0", "#f07c35", "#1fbf8f", "#f0b030", "#dd8fbb", "#8fd0f5", "#f0e442", null],
};
const LINE_PATTERNS = ["solid", "dashed", "dotted", "double", "wavy"];
const DASHES = { solid: [], dashed: [7, 4], dotted: [2, 3], double: [12, 3, 2, 3], wavy: [4, 2, 1, 2] };

const theme = { name: "light", ramp: null, colours: {} };
const themeListeners = [];

/** Be told after the colours have changed. */
function onTheme(listener) {
  themeListeners.push(listener);
}
const THEME_KEY = "mnemon-inspect-theme";

function parseColour(text) {
  return [1, 3, 5].map((start) => parseInt(text.slice(start, start + 2), 16));
}

/** Return 256 colours between the stops of a ramp. */
function interpolate(stops) {
  const colours = stops.map(parseColour);
  return Array.from({ length: 256 }, (_, step) => {
    const place = (step / 255) * (colours.length - 1);
    const index = Math.min(Math.floor(place), colours.length - 2);
    return colours[index].map((value, channel) => value + (colours[index + 1][channel] - value) * (place - index));
  });
}

function applyTheme(name) {
  document.documentElement.dataset.theme = name;
  theme.name = name;
  theme.ramp = interpolate(RAMPS[name]);
  const style = getComputedStyle(document.documentElement);
  for (const part of ["paper", "ink", "soft", "line", "accent", "gain", "loss", "panel"]) {
    theme.colours[part] = style.getPropertyValue(`--${part}`).trim();
  }
}

/** Return the colour of a share between 0 and 1; missing numbers get none. */
function rampColour(share) {
  const [red, green, blue] = theme.ramp[Math.round(Math.max(0, Math.min(1, share)) * 255)];
  return `rgb(${red} ${green} ${blue})`;
}

/** Return the colour of a memory. */
function categoryColour(index) {
  return CATEGORIES[theme.name][index % CATEGORIES.light.length] ?? theme.colours.ink;
}

/** Return the line pattern of a memory, which repeats in another rhythm than the colours. */
function categoryPattern(index) {
  return LINE_PATTERNS[index % LINE_PATTERNS.length];
}

/** Return a hexadecimal colour made transparent. */
function transparent(colour, share) {
  const [red, green, blue] = parseColour(colour);
  return `rgb(${red} ${green} ${blue} / ${share})`;
}

/** Follow the system until somebody chooses; return the button that chooses. */
function makeThemeButton() {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try {
    chosen = localStorage.getItem(THEME_KEY);
  } catch {
    // A page opened from a file may have no storage: then nothing is remembered.
  }
  const button = make("button", { type: "button", id: "theme", class: "plain" });
  const apply = (name) => {
    applyTheme(name);
    button.textContent = name === "dark" ? "Light" : "Dark";
    button.setAttribute("aria-label", `Change to the ${name === "dark" ? "light" : "dark"} colours`);
    redrawAll();
    for (const listener of themeListeners) listener();
  };
  const wanted = () => (RAMPS[chosen] ? chosen : dark.matches ? "dark" : "light");
  button.addEventListener("click", () => {
    chosen = theme.name === "dark" ? "light" : "dark";
    try {
      localStorage.setItem(THEME_KEY, chosen);
    } catch {
      // As above.
    }
    apply(chosen);
  });
  dark.addEventListener("change", () => apply(wanted()));
  window.addEventListener("beforeprint", () => {
    apply("light");
    drawNow();
  });
  window.addEventListener("afterprint", () => apply(wanted()));
  apply(wanted());
  return button;
}
