// Putting the page together.

makeHeader();
const sections = [
  makeTextSection(),
  makeBankSection(),
  makeMixtureSection(),
  makeTokenMemorySection(),
  makeKnockOutSection(),
  makeExplanationSection(),
].filter((section) => section !== null);
fill(document.getElementById("main"), ...sections);
makeBarOfPlace(sections);
fill(document.getElementById("footer"), `Written by ${library}. This page is complete: it loads nothing and sends nothing.`);
document.addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
window.addEventListener("scroll", () => tip.classList.contains("steady") || hideTip(), { passive: true });
redrawAll();
drawNow();
document.documentElement.dataset.ready = String(Math.round(performance.now()));
